// The matrix unit of a processor that has one (Intel's AMX), for products of many rows in bfloat16.
//
// Its registers are tiles of 16 rows of 64 bytes. One instruction adds to a tile of [16, 16] sums the product of a tile of
// [16, 32] numbers and one of [32, 16], of which the second keeps each two rows of a column together. Here the first are
// rows of the weights as they lie in memory, which is why nothing of them has to be rearranged; the second are rows of the
// inputs, which are, once for a product. So the sums of an output stand in a row, and are turned when they are stored.
#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HIVE_TILES
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr size_t SIDE = 16;        // of a tile of sums
constexpr size_t DEPTH = 2 * SIDE;  // positions of K that one instruction multiplies

// Linux lets a process use tiles once it has asked (ARCH_REQ_XCOMP_PERM for XTILEDATA).
inline bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return allowed;
}

// All eight tiles at their full size, for this thread, until the end of the scope.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("" ::"m"(config));
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// 16 rows of x, of which `rows` are there, as the second tiles of all instructions along K, one after another.
inline void arrange(const Bfloat *x, size_t rows, size_t K, Bfloat *into) {
    for (size_t k = 0; k < K; k += DEPTH, into += SIDE * DEPTH) {
        Floats two[SIDE] = {};
        for (size_t row = 0; row < rows; ++row) two[row] = load<Floats>(x + row * K + k);
        turn(two);
        std::memcpy(into, two, sizeof two);
    }
}

// [16 · w_tiles, 16 · x_tiles] sums of rows of w with arranged rows of x, tile by tile. `ahead`: nothing of w was read yet,
// nor of what follows it.
template <int w_tiles, int x_tiles>
void multiply(const Bfloat *w, const Bfloat *x, size_t K, bool ahead, float (*sums)[SIDE * SIDE]) {
    constexpr bool both = w_tiles > 1 && x_tiles > 1;
    _tile_zero(0);
    if constexpr (x_tiles > 1) _tile_zero(1);
    if constexpr (w_tiles > 1) _tile_zero(2);
    if constexpr (both) _tile_zero(3);
    for (size_t k = 0; k < K; k += DEPTH) {
        if (ahead)
            for (size_t row = 0; row < w_tiles * SIDE; ++row) __builtin_prefetch(w + (w_tiles * SIDE + row) * K + k);
        _tile_loadd(4, w + k, K * sizeof(Bfloat));
        _tile_stream_loadd(6, x + k * SIDE, 64);  // the first-level cache is for w, which comes again sooner
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (x_tiles > 1) {
            _tile_stream_loadd(7, x + (K + k) * SIDE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (w_tiles > 1) {
            _tile_loadd(5, w + SIDE * K + k, K * sizeof(Bfloat));
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (both) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    if constexpr (w_tiles > 1) _tile_stored(2, sums[1], 64);
    if constexpr (x_tiles > 1) _tile_stored(1, sums[w_tiles], 64);
    if constexpr (both) _tile_stored(3, sums[3], 64);
}

}  // namespace
#endif
