// Products of a few rows with a weight matrix, at the speed of memory: y[M, N] = x[M, K] · w[N, K]ᵀ + bias.
//
// Why it exists: one token through a linear layer only reads the weights once, and torch's products reach less than half
// of what memory delivers. One source for every CPU: vectors are the compiler's own (GCC, Clang), their width and the
// size of a tile follow from the target. Sums are float32 whatever the weights are.
//
// A tile is ROWS rows of x by COLUMNS rows of w: each vector that is loaded is used several times, and the partial sums
// stay in registers. x is walked in slices that fit the second-level cache, w is read once per slice. More rows in bfloat16
// go to the processor's matrix unit, where it has one (tiles.h).

#include <exception>
#include <type_traits>

#include "panels.h"
#include "pool.h"
#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int ROWS = LANES == 16 ? 6 : LANES == 8 ? 3 : 4;  // so that a tile's sums and inputs fill the registers
constexpr int COLUMNS = 4;
constexpr size_t SLICE_BYTES = 256 << 10;   // of x, so that it stays in the second-level cache

// How partial sums grow by one vector: STEP positions of K at once.
template <class X, class W>
struct Multiply {
    static constexpr int STEP = LANES;
    using Left = Floats;
    static Left left(const X *at) { return floats(at); }
    static Left right(const W *at) { return floats(at); }
    static Floats add(Floats total, Left x, Left w) { return total + x * w; }
};
#if defined(__AVX512BF16__)
template <>
struct Multiply<Bfloat, Bfloat> {
    static constexpr int STEP = 2 * LANES;
    using Left = __m512bh;
    static Left left(const Bfloat *at) { return load<__m512bh>(at); }
    static Left right(const Bfloat *at) { return load<__m512bh>(at); }
    static Floats add(Floats total, Left x, Left w) { return (Floats)_mm512_dpbf16_ps((__m512)total, x, w); }
};
#endif

// Weights in 4 bits (peers/model/kernels/packed.py): each group of GROUP has a scale and, with LEAST, a least weight.
constexpr size_t GROUP = 32;
struct Even {
    static constexpr size_t LEAST = 1;
    static constexpr float LEVELS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};
struct Normal {
    static constexpr size_t LEAST = 0;
    static constexpr float LEVELS[16] = {
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
        -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
        0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
};

struct Job {
    const void *x, *w;
    const float *scale, *bias;
    const Bfloat *groups;
    void *y;
    size_t M, N, K;
};

// Rows of x by columns [n, n + columns) of w; `first`: this part of w was not read before.
template <int rows, int columns, class X, class W>
struct Product {
    static inline void sum(const Job &job, const X *x, size_t n, bool first, float (*values)[columns]) {
        using Step = Multiply<X, W>;
        const size_t K = job.K;
        const W *w = (const W *)job.w + n * K;
        // one row alone has too few sums under way to hide the latency of an addition: it keeps two of each
        constexpr int TURNS = rows == 1 ? 2 : 1;
        Floats total[TURNS][rows][columns] = {};
        size_t k = 0;
        for (; k + TURNS * Step::STEP <= K; k += TURNS * Step::STEP)
            for (int turn = 0; turn < TURNS; ++turn) {
                const size_t at = k + turn * Step::STEP;
                typename Step::Left left[rows];
                for (int row = 0; row < rows; ++row) left[row] = Step::left(x + row * K + at);
                for (int column = 0; column < columns; ++column) {
                    const W *here = w + column * K + at;
                    if (first) __builtin_prefetch(here + columns * K);  // the same place in the next tile
                    auto right = Step::right(here);
                    for (int row = 0; row < rows; ++row)
                        total[turn][row][column] = Step::add(total[turn][row][column], left[row], right);
                }
            }
        for (int row = 0; row < rows; ++row) {
            if constexpr (TURNS == 2)
                for (int column = 0; column < columns; ++column) total[0][row][column] += total[1][row][column];
            sums<columns>(total[0][row], values[row]);
            for (int column = 0; column < columns; ++column)
                for (size_t rest = k; rest < K; ++rest)
                    values[row][column] += number(x[row * K + rest]) * number(w[column * K + rest]);
        }
    }
};

// The groups of columns [n, n + columns): bytes, and what their codes stand for.
template <class W>
struct Groups {
    const size_t count;
    const uint8_t *bytes;
    const Bfloat *scales;
    Levels levels;

    Groups(const Job &job, size_t n)
        : count((job.K + GROUP - 1) / GROUP), bytes((const uint8_t *)job.w + n * count * (GROUP / 2)),
          scales(job.groups + n * count * (1 + W::LEAST)), levels(load<Levels>(W::LEVELS)) {}
    const uint8_t *codes_of(size_t column, size_t group) const { return bytes + (column * count + group) * (GROUP / 2); }
    Levels levels_of(size_t column, size_t group) const {
        const Bfloat *scale = scales + (column * count + group) * (1 + W::LEAST);
        // both at once in every lane: the upper half of a float32 is the bfloat16
        const Codes both = W::LEAST ? everywhere(scale) : Codes{} + load<uint16_t>(scale);
        return levels.times((Floats)(both << 16), W::LEAST ? (Floats)(both & ~0xffff) : Floats{});
    }
    // Of a group's position k < GROUP.
    float one(size_t column, size_t group, size_t k) const {
        const uint8_t byte = codes_of(column, group)[k % (GROUP / 2)];
        return levels_of(column, group).one(k < GROUP / 2 ? byte & 15 : byte >> 4);
    }
};

template <int rows, int columns, class X, class W>
struct GroupedProduct {
    static inline void sum(const Job &job, const X *x, size_t n, bool first, float (*values)[columns]) {
        const size_t K = job.K, full = K / GROUP;
        const Groups<W> groups(job, n);
        constexpr int TURNS = rows == 1 ? 2 : 1;  // as above
        Floats total[TURNS][rows][columns] = {};
        for (size_t group = 0; group < full; ++group)
            for (int column = 0; column < columns; ++column) {
                const uint8_t *here = groups.codes_of(column, group);
                if (first) {
                    __builtin_prefetch(here + columns * groups.count * (GROUP / 2));
                    __builtin_prefetch(groups.scales + ((column + columns) * groups.count + group) * (1 + W::LEAST));
                }
                const Levels levels = groups.levels_of(column, group);
                for (size_t at = 0; at < GROUP / 2; at += LANES) {
                    const Codes both = codes(here + at);
                    const Floats lower = levels.of(both), upper = levels.of(both >> 4);
                    for (int row = 0; row < rows; ++row) {
                        const X *left = x + row * K + group * GROUP + at;
                        total[0][row][column] += floats(left) * lower;
                        total[TURNS - 1][row][column] += floats(left + GROUP / 2) * upper;
                    }
                }
            }
        for (int row = 0; row < rows; ++row) {
            if constexpr (TURNS == 2)
                for (int column = 0; column < columns; ++column) total[0][row][column] += total[1][row][column];
            sums<columns>(total[0][row], values[row]);
            for (int column = 0; column < columns; ++column)
                for (size_t k = full * GROUP; k < K; ++k)
                    values[row][column] += number(x[row * K + k]) * groups.one(column, full, k - full * GROUP);
        }
    }
};
template <int rows, int columns, class X>
struct Product<rows, columns, X, Even> : GroupedProduct<rows, columns, X, Even> {};
template <int rows, int columns, class X>
struct Product<rows, columns, X, Normal> : GroupedProduct<rows, columns, X, Normal> {};

// Room for `count` numbers at a multiple of a vector's size: loads that straddle two lines of the cache take longer.
using Aligned = std::vector<Floats>;
template <class T>
T *aligned(Aligned &buffer, size_t count) {
    buffer.resize(count * sizeof(T) / sizeof(Floats) + 1);
    return (T *)buffer.data();
}

template <class From, class To>
void convert(const From *from, size_t count, To *into) {
    size_t at = 0;
    for (; at + LANES <= count; at += LANES) store(into + at, floats(from + at));
    for (; at < count; ++at) store(into + at, number(from[at]));
}

// Positions [from, to) of columns [n, n + columns) of w as X, without the scale of an output; `from`: of a whole group.
template <class X, class W>
void unpack(const Job &job, size_t n, size_t columns, size_t from, size_t to, X *into) {
    if constexpr (std::is_same_v<W, Even> || std::is_same_v<W, Normal>) {
        const Groups<W> groups(job, n);
        for (size_t column = 0; column < columns; ++column) {
            size_t k = from;
            for (; k + GROUP <= to; k += GROUP, into += GROUP) {
                const Levels levels = groups.levels_of(column, k / GROUP);
                for (size_t at = 0; at < GROUP / 2; at += LANES) {
                    const Codes both = codes(groups.codes_of(column, k / GROUP) + at);
                    store(into + at, levels.of(both));
                    store(into + GROUP / 2 + at, levels.of(both >> 4));
                }
            }
            for (size_t group = k / GROUP, rest = 0; k + rest < to; ++rest) store(into++, groups.one(column, group, rest));
        }
    } else {
        for (size_t column = 0; column < columns; ++column, into += to - from)
            convert((const W *)job.w + (n + column) * job.K + from, to - from, into);
    }
}

template <int rows, int columns, class X, class W, class Y>
inline void tile(const Job &job, const X *x, Y *y, size_t n, bool first) {
    float values[rows][columns];
    Product<rows, columns, X, W>::sum(job, x, n, first, values);
    for (int row = 0; row < rows; ++row)
        for (int column = 0; column < columns; ++column) {
            float value = values[row][column];
            if (job.scale) value *= job.scale[n + column];
            if (job.bias) value += job.bias[n + column];
            store(y + row * job.N + column, value);
        }
}

template <int rows, int columns, class X, class W, class Y>
inline void tile_of(size_t count, const Job &job, const X *x, Y *y, size_t n, bool first) {
    if (count == rows) tile<rows, columns, X, W, Y>(job, x, y, n, first);
    else if constexpr (rows > 1) tile_of<rows - 1, columns, X, W, Y>(count, job, x, y, n, first);
}

// Rows [from, to) by columns [n, n + columns), in as few tiles as can be and those of equal height.
template <int columns, class X, class W, class Y>
void all_rows(const Job &job, size_t from, size_t to, size_t n) {
    if constexpr (!std::is_same_v<X, W>)
        if (to - from > ROWS || !std::is_same_v<X, float>) {  // what several tiles use is unpacked once
            static thread_local Aligned buffer;
            X *whole = aligned<X>(buffer, columns * job.K);
            unpack<X, W>(job, n, columns, 0, job.K, whole);
            const Job dense{job.x, whole, job.scale ? job.scale + n : nullptr, job.bias ? job.bias + n : nullptr,
                            nullptr, (Y *)job.y + n, job.M, job.N, job.K};
            return all_rows<columns, X, X, Y>(dense, from, to, 0);
        }
    if constexpr (std::is_same_v<X, W> || std::is_same_v<X, float>)
    for (size_t m = from, tiles = (to - from + ROWS - 1) / ROWS; tiles; --tiles) {
        size_t count = (to - m + tiles - 1) / tiles;
        tile_of<ROWS, columns, X, W, Y>(count, job, (const X *)job.x + m * job.K, (Y *)job.y + m * job.N + n, n,
                                        m == from);
        m += count;
    }
}

template <class X, class W, class Y>
void columns(const Job &job, size_t from, size_t to) {
    size_t slice = std::max<size_t>(SLICE_BYTES / (job.K * sizeof(X)) / ROWS, 1) * ROWS;
    for (size_t m = 0; m < job.M; m += slice) {
        size_t end = std::min(job.M, m + slice), n = from;
        for (; n + COLUMNS <= to; n += COLUMNS) all_rows<COLUMNS, X, W, Y>(job, m, end, n);
        for (; n < to; ++n) all_rows<1, X, W, Y>(job, m, end, n);
    }
}

template <class X, class W, class Y>
void share(const void *what, size_t part, size_t parts) {
    const Job &job = *(const Job *)what;
    size_t tiles = (job.N + COLUMNS - 1) / COLUMNS;
    columns<X, W, Y>(job, tiles * part / parts * COLUMNS, std::min(job.N, tiles * (part + 1) / parts * COLUMNS));
}

#if defined(HIVE_TILES)
constexpr size_t TILED_ROWS = ROWS + 1;  // from here on weights are read more than once without the unit
constexpr size_t ARRANGED_BYTES = 1 << 20;  // of x, so that it stays in the second-level cache

void arrange_share(const void *what, size_t part, size_t parts) {
    const Job &job = *(const Job *)what;
    const size_t panels = (job.M + SIDE - 1) / SIDE;
    for (size_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
        const size_t m = panel * SIDE;
        arrange((const Bfloat *)job.x + m * job.K, std::min(SIDE, job.M - m), job.K, (Bfloat *)job.y + m * job.K);
    }
}

// Sums of outputs [n, n + 16 · w_tiles) for rows [m, m + 16), as they are asked for.
template <int w_tiles>
void finish(const Job &job, float (*sums)[SIDE * SIDE], size_t m, size_t n) {
    Floats rows[w_tiles][SIDE];
    std::memcpy(rows, sums, sizeof rows);
    for (auto &tile : rows) turn(tile);
    for (size_t row = 0; row < std::min(SIDE, job.M - m); ++row)
        for (size_t tile = 0, at = n; tile < w_tiles; ++tile, at += SIDE) {
            Floats values = rows[tile][row];
            if (job.scale) values *= floats(job.scale + at);
            if (job.bias) values += floats(job.bias + at);
            store((Bfloat *)job.y + (m + row) * job.N + at, values);
        }
}

template <int w_tiles, class W>
void band(const Job &job, size_t n, size_t from, size_t to) {
    const Bfloat *w;
    if constexpr (std::is_same_v<W, Bfloat>) w = (const Bfloat *)job.w + n * job.K;
    else {
        static thread_local Aligned buffer;
        Bfloat *whole = aligned<Bfloat>(buffer, w_tiles * SIDE * job.K);
        unpack<Bfloat, W>(job, n, w_tiles * SIDE, 0, job.K, whole);
        asm volatile("" ::: "memory");  // the compiler does not know what tiles read
        w = whole;
    }
    alignas(64) float sums[4][SIDE * SIDE];
    for (size_t m = from; m < to; m += 2 * SIDE) {
        const Bfloat *x = (const Bfloat *)job.x + m * job.K;
        const bool ahead = m == 0 && std::is_same_v<W, Bfloat>;
        if (m + SIDE < to) {
            multiply<w_tiles, 2>(w, x, job.K, ahead, sums);
            finish<w_tiles>(job, sums, m, n);
            finish<w_tiles>(job, sums + w_tiles, m + SIDE, n);
        } else {
            multiply<w_tiles, 1>(w, x, job.K, ahead, sums);
            finish<w_tiles>(job, sums, m, n);
        }
    }
}

// As `share`, where x is arranged.
template <class W>
void tiled_share(const void *what, size_t part, size_t parts) {
    const Job &job = *(const Job *)what;
    const size_t tiles = job.N / SIDE, end = tiles * (part + 1) / parts;
    const size_t slice = std::max<size_t>(ARRANGED_BYTES / (job.K * sizeof(Bfloat)) / (2 * SIDE), 1) * 2 * SIDE;
    const Tiles on;
    for (size_t m = 0; m < job.M; m += slice) {
        const size_t to = std::min(job.M, m + slice);
        size_t tile = tiles * part / parts;
        for (; tile + 2 <= end; tile += 2) band<2, W>(job, tile * SIDE, m, to);
        for (; tile < end; ++tile) band<1, W>(job, tile * SIDE, m, to);
    }
}
#endif

// Many rows: w is walked in runs that stay, as the panels need them, in the first-level cache for all panels of a slice;
// sums of a run are added up, lest they grow far above what is added to them.
// In float32 faster from 12 rows on, but sums are added up in another order then: a token's should not depend on how many
// others, of sessions or of an expert, are computed with it. So this is for pieces of prompts. In bfloat16, where torch is
// as fast from there on, it is worth that.
constexpr size_t PANELLED_ROWS[2] = {64, NUMBERS<Panelled<Bfloat>> == 2 ? 28 : 64};
constexpr size_t RUN = 320;  // words
constexpr size_t SLICE_PANELS_MIN = 4;

template <class X>
void panel_share(const void *what, size_t part, size_t parts) {
    const Job &job = *(const Job *)what;
    const size_t panels = (job.M + PANEL - 1) / PANEL, words = words_of<X>(job.K);
    for (size_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
        const size_t m = panel * PANEL;
        panel_of((const X *)job.x + m * job.K, job.K, std::min(PANEL, job.M - m), job.K, (Word *)job.y + m * words);
    }
}

// Sums of outputs [n, n + columns) for `rows` rows, as they are asked for.
template <int columns, class Y>
inline void finish_panel(const Job &job, const Floats (*sums)[2], size_t n, size_t rows, Y *y) {
#if defined(__AVX512F__)
    if constexpr (columns > 1) {
        float scales[LANES], biases[LANES];
        for (int column = 0; column < columns; ++column) {
            scales[column] = job.scale ? job.scale[n + column] : 1;
            biases[column] = job.bias ? job.bias[n + column] : 0;
        }
        const Floats scale = floats(scales), bias = floats(biases);
        for (size_t side = 0; side < rows; side += LANES) {
            Floats square[LANES] = {};
            for (int column = 0; column < columns; ++column) square[column] = sums[column][side / LANES];
            turn(square);
            for (size_t row = side; row < std::min<size_t>(rows, side + LANES); ++row) {
                Y values[LANES];
                store(values, square[row - side] * scale + bias);
                std::memcpy(y + row * job.N, values, columns * sizeof(Y));
            }
        }
        return;
    }
#endif
    Y values[columns][PANEL];
    for (int column = 0; column < columns; ++column) {
        const float scale = job.scale ? job.scale[n + column] : 1, bias = job.bias ? job.bias[n + column] : 0;
        for (int at = 0; at < 2; ++at) store(values[column] + at * LANES, sums[column][at] * scale + bias);
    }
    for (size_t row = 0; row < rows; ++row, y += job.N)
        for (int column = 0; column < columns; ++column) y[column] = values[column][row];
}

// Rows [from, to) by columns [n, n + columns); `from`: of a whole panel.
template <int columns, class W, class Y>
void panelled(const Job &job, size_t n, size_t from, size_t to) {
    using X = Panelled<Y>;
    static thread_local Aligned buffer;
    const size_t panels = (to - from + PANEL - 1) / PANEL, words = words_of<X>(job.K);
    buffer.assign(panels * columns * 2, Floats{});
    auto *sums = (Floats (*)[2])buffer.data();
    alignas(64) Word near[columns * RUN];
    const size_t runs = (words + RUN - 1) / RUN, run = ((words + runs - 1) / runs + GROUP - 1) / GROUP * GROUP;
    for (size_t at = 0; at < words; at += run) {
        const size_t length = std::min(run, words - at), k = at * NUMBERS<X>;
        const Word *w = near;
        size_t stride = RUN;
        if constexpr (std::is_same_v<W, float>) w = (const Word *)job.w + n * job.K + k, stride = job.K;
        else {
            const size_t end = std::min(job.K, k + length * NUMBERS<X>);
            for (int column = 0; column < columns; ++column) {
                X *into = (X *)(near + column * RUN);
                if (end - k < length * NUMBERS<X>) into[end - k] = X{};
                unpack<X, W>(job, n + column, 1, k, end, into);
            }
        }
        for (size_t panel = 0; panel < panels; ++panel) {
            const Word *x = (const Word *)job.x + (from + panel * PANEL) * words + at * PANEL;
            if (to - from - panel * PANEL > LANES)
                multiply_panel<X, columns, 2>(x, w, length, stride, 1, sums + panel * columns);
            else multiply_panel<X, columns, 1>(x, w, length, stride, 1, sums + panel * columns);
        }
    }
    for (size_t panel = 0; panel < panels; ++panel) {
        const size_t m = from + panel * PANEL;
        finish_panel<columns>(job, sums + panel * columns, n, std::min(PANEL, to - m), (Y *)job.y + m * job.N + n);
    }
}

// As `share`, where x is arranged.
template <class W, class Y>
void panelled_share(const void *what, size_t part, size_t parts) {
    const Job &job = *(const Job *)what;
    const size_t groups = (job.N + WIDTH - 1) / WIDTH, row_bytes = words_of<Panelled<Y>>(job.K) * sizeof(Word);
    const size_t begin = groups * part / parts * WIDTH, end = std::min(job.N, groups * (part + 1) / parts * WIDTH);
    const size_t panels = (job.M + PANEL - 1) / PANEL;
    const size_t slices = (panels - 1) / std::max(SLICE_BYTES / row_bytes / PANEL, SLICE_PANELS_MIN) + 1;
    for (size_t slice = 0, m = 0; slice < slices; ++slice) {
        const size_t to = std::min(job.M, panels * (slice + 1) / slices * PANEL);
        size_t n = begin;
        for (; n + WIDTH <= end; n += WIDTH) panelled<WIDTH, W, Y>(job, n, m, to);
        for (; n < end; ++n) panelled<1, W, Y>(job, n, m, to);
        m = to;
    }
}

template <class X, class W>
void unpack_share(const void *what, size_t part, size_t parts) {
    const Job &job = *(const Job *)what;
    const size_t from = job.N * part / parts, to = job.N * (part + 1) / parts;
    X *into = (X *)job.y + from * job.K;
    unpack<X, W>(job, from, to - from, 0, job.K, into);
    if (job.scale)
        for (size_t n = from; n < to; ++n)
            for (size_t k = 0; k < job.K; ++k, ++into) store(into, number(*into) * job.scale[n]);
}

enum { PLAIN, INT8, INT4, NF4 };
Job packed_job(int weights, const void *w, const void *scales, size_t N, size_t K) {
    Job job{};
    job.w = w, job.N = N, job.K = K;
    (weights == INT8 ? (const void *&)job.scale : (const void *&)job.groups) = scales;
    return job;
}

}  // namespace

extern "C" {

// Called by peers/model/kernels/pool.py. Pointers are contiguous arrays; scales and bias may be null.
// inputs, of x and y: 0 float32 · 1 bfloat16; weights: 0 as x · 1 int8 · 2 int4 · 3 nf4
void hive_linear(void *pool, int inputs, int weights, const void *x, const void *w, const void *scales,
                 const float *bias, void *y, size_t M, size_t N, size_t K) {
    static constexpr hive::Work WORKS[3][4] = {
        {share<float, float, float>, share<float, int8_t, float>, share<float, Even, float>, share<float, Normal, float>},
        {share<Bfloat, Bfloat, Bfloat>, share<Bfloat, int8_t, Bfloat>, share<Bfloat, Even, Bfloat>,
         share<Bfloat, Normal, Bfloat>},
        {nullptr, share<float, int8_t, Bfloat>, share<float, Even, Bfloat>, share<float, Normal, Bfloat>}};
    const size_t halves = weights == PLAIN ? (inputs == 0 ? 8 : 4) : weights == INT8 ? 2 : 1;  // of a byte, each weight
    Job job = packed_job(weights, w, scales, N, K);
    job.x = x, job.bias = bias, job.y = y, job.M = M;
#if defined(HIVE_TILES)
    if (inputs == 1 && M >= TILED_ROWS && K % DEPTH == 0 && N % SIDE == 0 && tiles_allowed()) {
        static constexpr hive::Work TILED[4] = {tiled_share<Bfloat>, tiled_share<int8_t>, tiled_share<Even>,
                                                tiled_share<Normal>};
        static thread_local Aligned arranged;
        const size_t panels = (M + SIDE - 1) / SIDE;
        Job first = job;
        first.y = aligned<Bfloat>(arranged, panels * SIDE * K);
        ((hive::Pool *)pool)->run(arrange_share, &first, M * K * sizeof(Bfloat), panels);
        job.x = first.y;
        ((hive::Pool *)pool)->run(TILED[weights], &job, N * K * halves / 2, N / SIDE);
        return;
    }
#endif
    static thread_local Aligned wide;
    if (M >= PANELLED_ROWS[inputs]) {
        static constexpr hive::Work PANELS[2] = {panel_share<float>, panel_share<Bfloat>};
        static constexpr hive::Work PANELLED[2][4] = {
            {panelled_share<float, float>, panelled_share<int8_t, float>, panelled_share<Even, float>,
             panelled_share<Normal, float>},
            {panelled_share<Bfloat, Bfloat>, panelled_share<int8_t, Bfloat>, panelled_share<Even, Bfloat>,
             panelled_share<Normal, Bfloat>}};
        const size_t panels = (M + PANEL - 1) / PANEL, words = inputs == 0 ? K : words_of<Panelled<Bfloat>>(K);
        Job first = job;
        first.y = aligned<Word>(wide, panels * PANEL * words);
        ((hive::Pool *)pool)->run(PANELS[inputs], &first, panels * PANEL * words * sizeof(Word), panels);
        job.x = first.y;
        ((hive::Pool *)pool)->run(PANELLED[inputs][weights], &job, N * K * halves / 2, (N + WIDTH - 1) / WIDTH);
        return;
    }
    if (inputs == 1 && weights != PLAIN && M <= ROWS) {  // few inputs meet each weight: widened once, not with each
        job.x = aligned<float>(wide, M * K), inputs = 2;
        convert((const Bfloat *)x, M * K, (float *)job.x);
    }
    ((hive::Pool *)pool)->run(WORKS[inputs][weights], &job, N * K * halves / 2, (N + COLUMNS - 1) / COLUMNS);
}

// The weights [N, K] that packed ones stand for, as `outputs`: 0 float32 · 1 bfloat16.
void hive_unpack(void *pool, int outputs, int weights, const void *w, const void *scales, void *y, size_t N, size_t K) {
    static constexpr hive::Work WORKS[2][4] = {
        {nullptr, unpack_share<float, int8_t>, unpack_share<float, Even>, unpack_share<float, Normal>},
        {nullptr, unpack_share<Bfloat, int8_t>, unpack_share<Bfloat, Even>, unpack_share<Bfloat, Normal>}};
    Job job = packed_job(weights, w, scales, N, K);
    job.y = y;
    ((hive::Pool *)pool)->run(WORKS[outputs][weights], &job, N * K * (outputs == 0 ? 4 : 2), N);
}

void *hive_pool(int threads) {  // null when the system gives no more threads
    try {
        return new hive::Pool(threads - 1);
    } catch (const std::exception &) {
        return nullptr;
    }
}
void hive_pool_end(void *pool) { delete (hive::Pool *)pool; }
}
