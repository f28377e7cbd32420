// Attention of a few new positions per session over its own pages: y = softmax(q · kᵀ · scale) · v, for many sessions at
// once. Keys and values are read where they lie; nothing is gathered, padded or repeated for heads that share them.
//
// One unit of work is one session and one key/value head with the G query heads that share it. Scores are written out for
// one position at a time (G · L numbers), so that softmax is the definition's. Sums are float32.

#include <cmath>

#include "pool.h"
#include "vectors.h"

namespace {

struct Segment {
    int64_t first, count;          // rows of q and y
    int64_t first_run, num_runs;   // slots of all positions up to the last new one, in order
};
struct Run {
    int64_t slot, count;
};
struct Job {
    const void *q, *keys, *values;
    void *y;
    const Segment *segments;
    const Run *runs;
    const float *sinks;   // H, or null
    int64_t num_segments, H, J, K, V;
    int64_t q_head, q_row, key_head, key_slot, value_head, value_slot;   // strides, in values
    float scale, softcap;
};

template <class T>
inline float dot(const float *q, const T *key, int64_t K) {
    Floats total = {};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) total += floats(q + k) * floats(key + k);
    float sum;
    sums<1>(&total, &sum);
    for (; k < K; ++k) sum += q[k] * number(key[k]);
    return sum;
}

// Scores of one query head over a run of keys, `step` values apart.
template <class T>
void score(const float *q, const T *keys, int64_t count, int64_t K, int64_t step, float *out) {
    int64_t at = 0;
    if (K % LANES == 0)
        for (; at + 4 <= count; at += 4) {
            Floats total[4] = {};
            for (int64_t k = 0; k < K; k += LANES) {
                Floats left = floats(q + k);
                for (int key = 0; key < 4; ++key) total[key] += left * floats(keys + (at + key) * step + k);
            }
            sums<4>(total, out + at);
        }
    for (; at < count; ++at) out[at] = dot(q, keys + at * step, K);
}

// Turn scores into weights; returns their sum. Padded to whole vectors by the caller.
inline float soften(float *scores, int64_t count, float softcap, const float *sink) {
    if (softcap > 0)
        for (int64_t at = 0; at < count; ++at) scores[at] = std::tanh(scores[at] / softcap) * softcap;
    float largest = sink ? *sink : scores[0];
    for (int64_t at = 0; at < count; ++at) largest = std::max(largest, scores[at]);
    float sum = sink ? std::exp(*sink - largest) : 0;
    int64_t at = 0;
    Floats total = {};
    for (; at + LANES <= count; at += LANES) {
        Floats weight = exponential(floats(scores + at) - largest);
        std::memcpy(scores + at, &weight, sizeof weight);
        total += weight;
    }
    float lanes;
    sums<1>(&total, &lanes);
    for (; at < count; ++at) lanes += scores[at] = std::exp(scores[at] - largest);
    return sum + lanes;
}

// WIDTH vectors of the output from value column v on, for HEADS query heads: sums over all runs stay in registers.
template <int HEADS, int WIDTH, class T>
inline void mix(const Job &job, const T *values, const Run *runs, int64_t num_runs, int64_t length, const float *weights,
                int64_t stride, int64_t v, float *out) {
    Floats total[HEADS][WIDTH] = {};
    int64_t position = 0;
    for (int64_t run = 0; run < num_runs && position < length; ++run) {
        const T *from = values + runs[run].slot * job.value_slot + v;
        int64_t count = std::min(runs[run].count, length - position);
        for (int64_t at = 0; at < count; ++at, ++position) {
            Floats value[WIDTH];
            for (int column = 0; column < WIDTH; ++column) value[column] = floats(from + at * job.value_slot + column * LANES);
            for (int head = 0; head < HEADS; ++head)
                for (int column = 0; column < WIDTH; ++column)
                    total[head][column] += value[column] * weights[head * stride + position];
        }
    }
    for (int head = 0; head < HEADS; ++head) std::memcpy(out + head * job.V + v, total[head], sizeof total[head]);
}

template <int HEADS, class T>
void mix_all(const Job &job, const T *values, const Run *runs, int64_t num_runs, int64_t length, const float *weights,
             int64_t stride, float *out) {
    int64_t v = 0;
    for (; v + 4 * LANES <= job.V; v += 4 * LANES)
        mix<HEADS, 4>(job, values, runs, num_runs, length, weights, stride, v, out);
    for (; v + LANES <= job.V; v += LANES)
        mix<HEADS, 1>(job, values, runs, num_runs, length, weights, stride, v, out);
    for (; v < job.V; ++v)
        for (int head = 0; head < HEADS; ++head) {
            float total = 0;
            int64_t position = 0;
            for (int64_t run = 0; run < num_runs; ++run)
                for (int64_t at = 0; at < runs[run].count && position < length; ++at, ++position)
                    total += weights[head * stride + position] * number(values[(runs[run].slot + at) * job.value_slot + v]);
            out[head * job.V + v] = total;
        }
}

template <class T>
void one(const Job &job, const Segment &segment, int64_t j, std::vector<float> &scratch) {
    const int64_t G = job.H / job.J;
    const Run *runs = job.runs + segment.first_run;
    int64_t all = 0;
    for (int64_t run = 0; run < segment.num_runs; ++run) all += runs[run].count;
    const T *keys = (const T *)job.keys + j * job.key_head, *values = (const T *)job.values + j * job.value_head;
    scratch.resize(G * (all + job.K + job.V) + G);
    float *scores = scratch.data(), *query = scores + G * all, *out = query + G * job.K, *total = out + G * job.V;
    for (int64_t row = 0; row < segment.count; ++row) {
        const int64_t length = all - segment.count + row + 1;  // a position sees itself and what came before
        for (int64_t g = 0; g < G; ++g) {
            const T *q = (const T *)job.q + (j * G + g) * job.q_head + (segment.first + row) * job.q_row;
            for (int64_t k = 0; k < job.K; ++k) query[g * job.K + k] = number(q[k]) * job.scale;
        }
        int64_t position = 0;
        for (int64_t run = 0; run < segment.num_runs && position < length; ++run) {
            int64_t count = std::min(runs[run].count, length - position);
            for (int64_t g = 0; g < G; ++g)
                score(query + g * job.K, keys + runs[run].slot * job.key_slot, count, job.K, job.key_slot,
                      scores + g * all + position);
            position += count;
        }
        for (int64_t g = 0; g < G; ++g)
            total[g] = soften(scores + g * all, length, job.softcap, job.sinks ? job.sinks + j * G + g : nullptr);
        int64_t g = 0;
        constexpr int MOST = REGISTERS == 32 ? 4 : 2;
        for (; g + MOST <= G; g += MOST)
            mix_all<MOST>(job, values, runs, segment.num_runs, length, scores + g * all, all, out + g * job.V);
        for (; g < G; ++g) mix_all<1>(job, values, runs, segment.num_runs, length, scores + g * all, all, out + g * job.V);
        for (g = 0; g < G; ++g) {
            T *y = (T *)job.y + ((segment.first + row) * job.H + j * G + g) * job.V;
            for (int64_t v = 0; v < job.V; ++v) store(y + v, out[g * job.V + v] / total[g]);
        }
    }
}

template <class T>
void share(const void *what, size_t part, size_t parts) {
    const Job &job = *(const Job *)what;
    thread_local std::vector<float> scratch;
    const int64_t units = job.num_segments * job.J;
    for (int64_t unit = units * part / parts, end = units * (part + 1) / parts; unit < end; ++unit)
        one<T>(job, job.segments[unit / job.J], unit % job.J, scratch);
}

}  // namespace

extern "C" {

// Called by peers/model/kernels/pool.py. q is [H, T, K], keys are [J, slots, K] and values [J, slots, V], with the given
// strides (in values) and rows that are contiguous; y is [T, H, V]; kind: 0 float32 · 1 bfloat16. softcap 0: none. sinks
// may be null.
void hive_attend(void *pool, int kind, const void *q, const void *keys, const void *values, void *y,
                 const int64_t *segments, int64_t num_segments, const int64_t *runs, const float *sinks, int64_t H,
                 int64_t J, int64_t K, int64_t V, int64_t q_head, int64_t q_row, int64_t key_head, int64_t key_slot,
                 int64_t value_head, int64_t value_slot, float scale, float softcap, int64_t positions) {
    Job job{q, keys, values, y, (const Segment *)segments, (const Run *)runs, sinks, num_segments, H, J, K, V,
            q_head, q_row, key_head, key_slot, value_head, value_slot, scale, softcap};
    size_t bytes = positions * J * (K + V) * (kind ? 2 : 4);
    ((hive::Pool *)pool)->run(kind ? share<Bfloat> : share<float>, &job, bytes, num_segments * J);
}
}
