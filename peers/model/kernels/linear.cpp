// Products of a few rows with a weight matrix, at the speed of memory: y[M, N] = x[M, K] · w[N, K]ᵀ · scale + bias.
//
// Why it exists: one token through a linear layer only reads the weights once, and torch's products reach less than half
// of what memory delivers. One source for every CPU: vectors are the compiler's own (GCC, Clang), their width and the
// size of a tile follow from the target. Sums are float32 whatever the weights are.
//
// A tile is ROWS rows of x by COLUMNS rows of w: each vector that is loaded is used several times, and the partial sums
// stay in registers. x is walked in slices that fit the second-level cache, w is read once per slice.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 3;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int COLUMNS = 4;
constexpr size_t SLICE_BYTES = 256 << 10;   // of x, so that it stays in the second-level cache
constexpr size_t SHARE_BYTES = 128 << 10;   // of w per thread: below it, waking one costs more than it gives
constexpr auto SPIN = std::chrono::microseconds(100);  // longer than a layer takes between two products

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

inline void store(float *at, float value) { *at = value; }
inline void store(Bfloat *at, float value) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    at->bits = value != value ? 0x7fc0 : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
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

using Work = void (*)(const Job &, size_t, size_t);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `ready` came true soon: going to sleep and being woken takes longer than most products.
template <class Ready>
bool spin(Ready ready) {
    for (auto until = std::chrono::steady_clock::now() + SPIN; std::chrono::steady_clock::now() < until;)
        for (int turn = 0; turn < 8; ++turn) {
            if (ready()) return true;
            relax();
        }
    return ready();
}

// Helpers that sleep when there is nothing to do. One product at a time: callers take turns. Work is taken in small parts by whoever
// comes, so a helper that the system lets wait delays nobody: the caller does its share too.
class Pool {
  public:
    explicit Pool(int helpers) {
        try {
            for (int index = 0; index < helpers; ++index) threads.emplace_back([this] { serve(); });
        } catch (...) {
            end();
            throw;
        }
    }
    ~Pool() { end(); }
    void run(Work task, const Job &what, size_t weight_bytes) {
        if (threads.empty() || weight_bytes < 2 * SHARE_BYTES) return task(what, 0, what.N);
        std::lock_guard<std::mutex> turn(one_at_a_time);
        uint32_t number = uint32_t(ticket.load(std::memory_order_relaxed) >> 32) + 1;
        ticket.store(uint64_t(number) << 32 | UINT32_MAX);  // late helpers of the last product find nothing to take
        work = task, job = what;
        tiles = (what.N + COLUMNS - 1) / COLUMNS;
        parts.store((uint32_t)std::min<size_t>(4 * (threads.size() + 1), weight_bytes / SHARE_BYTES));
        done.store(0);
        ticket.store(uint64_t(number) << 32);
        announce();
        while (take(number)) {}
        if (!spin([&] { return done.load(std::memory_order_acquire) == parts; }))
            while (done.load(std::memory_order_acquire) < parts) std::this_thread::yield();
    }

  private:
    void end() {
        ended.store(true);
        announce();
        for (auto &thread : threads) thread.join();
    }
    void announce() {
        round.fetch_add(1, std::memory_order_release);
        round.notify_all();
    }
    // Do one part of product `number`; false when there is none left. The fields are read while a part of it is held,
    // and until that part is done they do not change.
    bool take(uint32_t number) {
        uint64_t now = ticket.load(std::memory_order_acquire);
        do {
            if (uint32_t(now >> 32) != number || uint32_t(now) >= parts.load(std::memory_order_relaxed)) return false;
        } while (!ticket.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire));
        size_t part = uint32_t(now), all = parts.load(std::memory_order_relaxed);
        work(job, tiles * part / all * COLUMNS, std::min(job.N, tiles * (part + 1) / all * COLUMNS));
        done.fetch_add(1, std::memory_order_release);
        return true;
    }
    void serve() {
        for (unsigned seen = 0; !ended.load();) {
            if (!spin([&] { return round.load(std::memory_order_acquire) != seen; }))
                round.wait(seen, std::memory_order_acquire);
            seen = round.load(std::memory_order_acquire);
            while (take(uint32_t(ticket.load(std::memory_order_acquire) >> 32))) {}
        }
    }

    std::vector<std::thread> threads;
    std::mutex one_at_a_time;
    std::atomic<bool> ended{false};
    std::atomic<unsigned> round{0};
    std::atomic<uint64_t> ticket{0};   // number of the product << 32 | its next part
    std::atomic<uint32_t> parts{0}, done{0};
    size_t tiles = 0;
    Work work = nullptr;
    Job job{};
};

}  // namespace

extern "C" {

// Called by peers/model/kernels/linear.py. Pointers are contiguous arrays; scale and bias may be null.
// kind: 0 float32 · 1 bfloat16 · 2 int8 weights with float32 x and y · 3 int8 weights with bfloat16 x and y
void hive_linear(void *pool, int kind, const void *x, const void *w, const float *scale, const float *bias, void *y,
                 size_t M, size_t N, size_t K) {
    static constexpr Work WORKS[] = {columns<float, float, float>, columns<Bfloat, Bfloat, Bfloat>,
                                     columns<float, int8_t, float>, columns<Bfloat, int8_t, Bfloat>};
    static constexpr size_t BYTES[] = {4, 2, 1, 1};
    Job job{x, w, scale, bias, y, M, N, K};
    ((Pool *)pool)->run(WORKS[kind], job, N * K * BYTES[kind]);
}

void *hive_pool(int threads) {  // null when the system gives no more threads
    try {
        return new Pool(threads - 1);
    } catch (const std::exception &) {
        return nullptr;
    }
}
void hive_pool_end(void *pool) { delete (Pool *)pool; }
}
