// Vectors as wide as the processor's, made of float32 whatever is stored. The compiler's own (GCC, Clang): one source for
// every processor, with what compilers do badly by themselves spelled out for x86.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
template <class T>
using Vector __attribute__((vector_size(LANES * sizeof(T)))) = T;
using Floats = Vector<float>;

struct Bfloat { uint16_t bits; };

template <class T, class From>
T load(const From *at) {
    T value;
    std::memcpy(&value, at, sizeof(T));
    return value;
}

// Vectors of float32 from what the weights are. Compilers widen small integers one by one unless told how.
inline Floats floats(const float *at) { return load<Floats>(at); }
#if defined(__AVX512F__)
inline Floats floats(const Bfloat *at) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(at)), 16);
}
inline Floats floats(const int8_t *at) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(at)));
}
#elif defined(__AVX2__)
inline Floats floats(const Bfloat *at) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(at)), 16);
}
inline Floats floats(const int8_t *at) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
}
#else
inline Floats floats(const Bfloat *at) {
    auto wide = __builtin_convertvector(load<Vector<uint16_t>>(at), Vector<uint32_t>) << 16;
    Floats value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
inline Floats floats(const int8_t *at) {
    return __builtin_convertvector(__builtin_convertvector(load<Vector<int8_t>>(at), Vector<int32_t>), Floats);
}
#endif

inline float number(float value) { return value; }
inline float number(int8_t value) { return value; }
inline float number(Bfloat value) {
    uint32_t wide = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

using Codes = Vector<int32_t>;

// Four bytes in every lane.
inline Codes everywhere(const void *at) {
    Codes value = Codes{} + load<int32_t>((const char *)at);
#if defined(__AVX2__)
    asm("" : "+v"(value));  // else GCC computes with them first, and a copy from there to a vector takes long
#endif
    return value;
}

// Bytes as they are stored: two 4-bit codes each.
inline Codes codes(const uint8_t *at) {
#if defined(__AVX512F__)
    return (Codes)_mm512_cvtepu8_epi32(load<__m128i>(at));
#elif defined(__AVX2__)
    return (Codes)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
#else
    return __builtin_convertvector(load<Vector<uint8_t>>(at), Codes);
#endif
}

// What the 16 codes of 4 bits stand for.
struct Levels {
    Floats part[16 / LANES];

    // Of each lane's lower 4 bits.
    Floats of(Codes code) const {
#if defined(__AVX512F__)
        return (Floats)_mm512_permutexvar_ps((__m512i)code, (__m512)part[0]);
#elif defined(__AVX2__)
        __m256 less = _mm256_permutevar8x32_ps((__m256)part[0], (__m256i)code);
        __m256 more = _mm256_permutevar8x32_ps((__m256)part[1], (__m256i)code);
        return (Floats)_mm256_blendv_ps(less, more, (__m256)_mm256_slli_epi32((__m256i)code, 28));
#else
        Floats value;
        for (int lane = 0; lane < LANES; ++lane) value[lane] = one(code[lane] & 15);
        return value;
#endif
    }
    float one(int code) const { return part[code / LANES][code % LANES]; }
    Levels times(Floats scale, Floats least) const {
        Levels result;
        for (int index = 0; index < 16 / LANES; ++index) result.part[index] = part[index] * scale + least;
        return result;
    }
};

inline void store(float *at, float value) { *at = value; }
inline void store(Bfloat *at, float value) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    at->bits = value != value ? 0x7fc0 : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

template <class T>
inline void store(T *at, Floats values) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(Bfloat)) {
        __m256bh halves = _mm512_cvtneps_pbh((__m512)values);
        std::memcpy(at, &halves, sizeof halves);
        return;
    }
#endif
    for (int lane = 0; lane < LANES; ++lane) store(at + lane, values[lane]);
}

// The sum over the lanes of each of `columns` vectors.
template <int columns>
inline void sums(const Floats *totals, float *result) {
#if defined(__AVX2__)
    if constexpr (columns == 4) {
        __m256 half[4];
        for (int column = 0; column < 4; ++column)
#if defined(__AVX512F__)
            half[column] = _mm256_add_ps(_mm512_castps512_ps256((__m512)totals[column]),
                                         _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)totals[column], 1)));
#else
            half[column] = (__m256)totals[column];
#endif
        __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
        _mm_storeu_ps(result, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
        return;
    }
#endif
    for (int column = 0; column < columns; ++column) {
        result[column] = 0;
        for (int lane = 0; lane < LANES; ++lane) result[column] += totals[column][lane];
    }
}

#if defined(__AVX512F__)
// Rows and columns of 16 by 16 numbers of 32 bits change places.
inline void turn(Floats *rows) {
    __m512 pairs[LANES], fours[LANES];
    for (int at = 0; at < LANES; at += 2) {
        pairs[at] = _mm512_unpacklo_ps((__m512)rows[at], (__m512)rows[at + 1]);
        pairs[at + 1] = _mm512_unpackhi_ps((__m512)rows[at], (__m512)rows[at + 1]);
    }
    for (int at = 0; at < LANES; at += 4)
        for (int half = 0; half < 2; ++half) {
            const __m512d left = (__m512d)pairs[at + half], right = (__m512d)pairs[at + half + 2];
            fours[at + 2 * half] = (__m512)_mm512_unpacklo_pd(left, right);
            fours[at + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(left, right);
        }
    for (int at = 0; at < 4; ++at) {  // four lanes of 128 bits each hold a column of four rows
        const __m512 even[2] = {_mm512_shuffle_f32x4(fours[at], fours[at + 4], 0x88),
                                _mm512_shuffle_f32x4(fours[at + 8], fours[at + 12], 0x88)};
        const __m512 odd[2] = {_mm512_shuffle_f32x4(fours[at], fours[at + 4], 0xdd),
                               _mm512_shuffle_f32x4(fours[at + 8], fours[at + 12], 0xdd)};
        rows[at] = (Floats)_mm512_shuffle_f32x4(even[0], even[1], 0x88);
        rows[at + 4] = (Floats)_mm512_shuffle_f32x4(odd[0], odd[1], 0x88);
        rows[at + 8] = (Floats)_mm512_shuffle_f32x4(even[0], even[1], 0xdd);
        rows[at + 12] = (Floats)_mm512_shuffle_f32x4(odd[0], odd[1], 0xdd);
    }
}
#endif

// e^x to about 2e-7 for x <= 0, as Cephes' expf: 2^n times a polynomial of the rest.
inline Floats exponential(Floats x) {
    const Floats low = Floats{} - 87.0f;
    x = x < low ? low : x;
    const Floats magic = Floats{} + 12582912.0f;  // adding it rounds to the nearest integer
    Floats n = x * 1.44269504f + magic;
    auto bits = load<Vector<int32_t>>((const int32_t *)&n);
    n -= magic;
    x -= n * 0.693359375f;
    x += n * 2.12194440e-4f;
    Floats y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    auto power = ((bits - 0x4b400000) + 127) << 23;
    return y * load<Floats>((const float *)&power);
}

inline Floats sigmoid(Floats x) {
    Floats e = exponential(x < 0 ? x : -x), one = Floats{} + 1.0f;
    return (x < 0 ? e : one) / (one + e);
}
inline Floats tanh_of(Floats x) { return sigmoid(x + x) * 2.0f - 1.0f; }

}  // namespace
