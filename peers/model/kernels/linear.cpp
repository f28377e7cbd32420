// Products of a few rows with a weight matrix, at the speed of memory: y[M, N] = x[M, K] · w[N, K]ᵀ · scale + bias.
//
// Why it exists: one token through a linear layer only reads the weights once, and torch's products reach less than half
// of what memory delivers. One source for every CPU: vectors are the compiler's own (GCC, Clang), their width and the
// size of a tile follow from the target. Sums are float32 whatever the weights are.
//
// A tile is ROWS rows of x by COLUMNS rows of w: each vector that is loaded is used several times, and the partial sums
// stay in registers. x is walked in slices that fit the second-level cache, w is read once per slice.

#include <exception>

#include "pool.h"
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

struct Job {
    const void *x, *w;
    const float *scale, *bias;
    void *y;
    size_t M, N, K;
};

template <int rows, int columns, class X, class W, class Y>
inline void tile(const Job &job, const X *x, const W *w, Y *y, size_t n, bool first) {
    using Step = Multiply<X, W>;
    const size_t K = job.K;
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
        float values[columns];
        if constexpr (TURNS == 2)
            for (int column = 0; column < columns; ++column) total[0][row][column] += total[1][row][column];
        sums<columns>(total[0][row], values);
        for (int column = 0; column < columns; ++column) {
            for (size_t rest = k; rest < K; ++rest)
                values[column] += number(x[row * K + rest]) * number(w[column * K + rest]);
            if (job.scale) values[column] *= job.scale[n + column];
            if (job.bias) values[column] += job.bias[n + column];
            store(y + row * job.N + column, values[column]);
        }
    }
}

template <int rows, int columns, class X, class W, class Y>
inline void tile_of(size_t count, const Job &job, const X *x, const W *w, Y *y, size_t n, bool first) {
    if (count == rows) tile<rows, columns>(job, x, w, y, n, first);
    else if constexpr (rows > 1) tile_of<rows - 1, columns>(count, job, x, w, y, n, first);
}

// Rows [from, to) by columns [n, n + columns), in as few tiles as can be and those of equal height.
template <int columns, class X, class W, class Y>
void all_rows(const Job &job, size_t from, size_t to, size_t n) {
    const W *w = (const W *)job.w + n * job.K;
    for (size_t m = from, tiles = (to - from + ROWS - 1) / ROWS; tiles; --tiles) {
        size_t count = (to - m + tiles - 1) / tiles;
        tile_of<ROWS, columns>(count, job, (const X *)job.x + m * job.K, w, (Y *)job.y + m * job.N + n, n, m == from);
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

}  // namespace

extern "C" {

// Called by peers/model/kernels/pool.py. Pointers are contiguous arrays; scale and bias may be null.
// kind: 0 float32 · 1 bfloat16 · 2 int8 weights with float32 x and y · 3 int8 weights with bfloat16 x and y
void hive_linear(void *pool, int kind, const void *x, const void *w, const float *scale, const float *bias, void *y,
                 size_t M, size_t N, size_t K) {
    static constexpr hive::Work WORKS[] = {share<float, float, float>, share<Bfloat, Bfloat, Bfloat>,
                                     share<float, int8_t, float>, share<Bfloat, int8_t, Bfloat>};
    static constexpr size_t BYTES[] = {4, 2, 1, 1};
    Job job{x, w, scale, bias, y, M, N, K};
    ((hive::Pool *)pool)->run(WORKS[kind], &job, N * K * BYTES[kind], (N + COLUMNS - 1) / COLUMNS);
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
