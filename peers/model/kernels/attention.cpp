// Attention of new positions of sessions over their own pages: y = softmax(q · kᵀ · scale) · v, for many sessions at once.
// Nothing is padded, or repeated for heads that share keys. Sums are float32.
//
// A few positions of one session: keys and values are read where they lie. One unit of work is one key/value head with the
// G query heads that share it. Scores are written out for one position at a time (G · L numbers), so that softmax is the
// definition's.
//
// Many: one unit is some of them, with their G heads, as panels (panels.h): lanes are positions and heads. Keys and values
// are copied a block at a time, for all panels of the unit, and softmax is kept up to date block by block, as
// FlashAttention does (arXiv 2205.14135, section 3.1).

#include <cmath>

#include "panels.h"
#include "pool.h"

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

constexpr int64_t FEW = 16;          // new positions of a session
constexpr int64_t UNIT_PANELS = 4;
constexpr size_t BLOCK = 12 * WIDTH;  // keys
using Pair = Floats[2];               // a number for each lane of a panel

// One panel of a unit: lane c stands for position c / G of the segment and query head c % G of a key/value head.
struct Softmax {
    Pair most, total, last;  // of scores so far; of weights so far; the last position that is seen
    size_t lanes;
};

// Positions [from, from + count) of a segment's keys and values: keys as words along K, values as words of neighbours.
template <class T, class X>
struct Block {
    const size_t key_words, V;
    std::vector<Word> keys, values;

    Block(const Job &job)
        : key_words(words_of<T>(job.K)), V(job.V), keys(BLOCK * key_words), values(BLOCK * V) {}
    void read(const Job &job, const Run *&run, int64_t &offset, const T *from_keys, const T *from_values,
              size_t count) {
        if (count % NUMBERS<X>) std::fill_n(values.data() + count / NUMBERS<X> * V, V, 0);
        for (size_t at = 0; at < count; ++at, ++offset) {
            while (offset == run->count) ++run, offset = 0;
            const T *key = from_keys + (run->slot + offset) * job.key_slot;
            const T *value = from_values + (run->slot + offset) * job.value_slot;
            X *to = (X *)(keys.data() + at * key_words);
            if constexpr (std::is_same_v<T, X>) std::memcpy(to, key, job.K * sizeof(T));
            else
                for (int64_t k = 0; k < job.K; ++k) to[k] = number(key[k]);
            X *into = (X *)(values.data() + at / NUMBERS<X> * V) + at % NUMBERS<X>;
            for (size_t v = 0; v < V; ++v)
                if constexpr (std::is_same_v<T, X>) into[v * NUMBERS<X>] = value[v];
                else into[v] = number(value[v]);
        }
    }
};

// multiply_panel for any number of columns.
template <class X, int width = WIDTH>
void multiply_columns(const Word *x, const Word *w, size_t length, size_t columns, size_t column_step, size_t step,
                      Pair *sums) {
    for (; columns >= width; columns -= width, w += width * column_step, sums += width)
        multiply_panel<X, width, 2>(x, w, length, column_step, step, sums);
    if constexpr (width > 1) multiply_columns<X, (width + 2) / 3>(x, w, length, columns, column_step, step, sums);
}

// Weights of `count` keys from position `first` on, as words of neighbours in place of their scores; `out` is scaled to go
// on with them.
template <class X>
void soften_block(const Job &job, Pair *scores, int64_t first, size_t count, bool masked, Softmax &state, Pair *out) {
    for (int at = 0; at < 2; ++at) {
        Floats most = state.most[at];
        for (size_t key = 0; key < count; ++key) {
            Floats score = scores[key][at] * job.scale;
            if (job.softcap > 0) score = tanh_of(score / job.softcap) * job.softcap;
            if (masked) score = Floats{} + float(first + int64_t(key)) > state.last[at] ? Floats{} - INFINITY : score;
            scores[key][at] = score;
            most = score > most ? score : most;
        }
        const Floats factor = exponential(state.most[at] - most);
        Floats total = state.total[at] * factor;
        state.most[at] = most;
        for (int64_t v = 0; v < job.V; ++v) out[v][at] *= factor;
        for (size_t key = 0; key < count; key += NUMBERS<X>) {
            Floats weight = exponential(scores[key][at] - most);
            total += weight;
            Vector<uint32_t> bits = load<Vector<uint32_t>>((const Word *)&weight);
            if constexpr (NUMBERS<X> == 2) {  // to the nearest, ties to even
                bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
                if (key + 1 < count) {
                    weight = exponential(scores[key + 1][at] - most);
                    total += weight;
                    const auto upper = load<Vector<uint32_t>>((const Word *)&weight);
                    bits |= (upper + 0x7fff + ((upper >> 16) & 1)) & 0xffff0000;
                }
            }
            std::memcpy(&scores[key / NUMBERS<X>][at], &bits, sizeof bits);
        }
        state.total[at] = total;
    }
}

// Rows of y, each of the V numbers of a lane.
template <class T>
void finish_lanes(const Job &job, const Pair *out, const Softmax &state, T *const *y) {
    for (size_t side = 0; side < state.lanes; side += LANES) {
        const Floats total = state.total[side / LANES];
        const size_t lanes = std::min<size_t>(LANES, state.lanes - side);
        int64_t v = 0;
#if defined(__AVX512F__)
        for (; v + LANES <= job.V; v += LANES) {
            Floats square[LANES];
            for (int column = 0; column < LANES; ++column) square[column] = out[v + column][side / LANES] / total;
            turn(square);
            for (size_t lane = 0; lane < lanes; ++lane) store(y[side + lane] + v, square[lane]);
        }
#endif
        for (; v < job.V; ++v) {
            const Floats values = out[v][side / LANES] / total;
            for (size_t lane = 0; lane < lanes; ++lane) store(y[side + lane] + v, values[lane]);
        }
    }
}

// Panels [from, to) of a segment, of key/value head j.
template <class T>
void many(const Job &job, const Segment &segment, int64_t j, int64_t from, int64_t to) {
    using X = Panelled<T>;
    const int64_t G = job.H / job.J, begin = from * PANEL, end = std::min<int64_t>(to * PANEL, segment.count * G);
    const Run *run = job.runs + segment.first_run;
    int64_t past = -segment.count, offset = 0;
    for (int64_t at = 0; at < segment.num_runs; ++at) past += run[at].count;
    const T *keys = (const T *)job.keys + j * job.key_head, *values = (const T *)job.values + j * job.value_head;
    const size_t panels = to - from, words = words_of<T>(job.K);
    std::vector<Word> queries(panels * words * PANEL);
    std::vector<Floats> sums((panels * job.V + BLOCK) * 2);
    Pair *const out = (Pair *)sums.data(), *const scores = out + panels * job.V;
    std::vector<Softmax> states(panels);
    std::vector<T *> y(panels * PANEL);
    std::vector<T> rows(PANEL * job.K);
    for (size_t panel = 0; panel < panels; ++panel) {
        Softmax &state = states[panel];
        state.lanes = std::min<size_t>(PANEL, end - begin - panel * PANEL);
        for (size_t lane = 0; lane < PANEL; ++lane) {
            const int64_t c = std::min<int64_t>(begin + panel * PANEL + lane, end - 1), row = c / G;
            const int64_t head = j * G + c % G, of_q = head * job.q_head + (segment.first + row) * job.q_row;
            state.last[lane / LANES][lane % LANES] = float(past + row);
            state.most[lane / LANES][lane % LANES] = job.sinks ? job.sinks[head] : -INFINITY;
            state.total[lane / LANES][lane % LANES] = job.sinks ? 1 : 0;
            y[panel * PANEL + lane] = (T *)job.y + ((segment.first + row) * job.H + head) * job.V;
            std::memcpy(rows.data() + lane * job.K, (const T *)job.q + of_q, job.K * sizeof(T));
        }
        panel_of(rows.data(), job.K, state.lanes, job.K, queries.data() + panel * words * PANEL);
    }
    Block<T, X> block(job);
    const int64_t length = past + (end - 1) / G + 1;
    for (int64_t first = 0; first < length; first += BLOCK) {
        const size_t count = std::min<int64_t>(BLOCK, length - first);
        block.read(job, run, offset, keys, values, count);
        for (size_t panel = 0; panel < panels; ++panel) {
            const int64_t lane = begin + panel * PANEL, last_lane = std::min<int64_t>(lane + PANEL, end) - 1;
            const int64_t seen = std::min<int64_t>(count, past + last_lane / G + 1 - first);
            if (seen <= 0) continue;
            const Word *const q = queries.data() + panel * words * PANEL;
            std::fill_n((Floats *)scores, seen * 2, Floats{});
            multiply_columns<X>(q, block.keys.data(), words, seen, words, 1, scores);
            Pair *const own = out + panel * job.V;
            soften_block<X>(job, scores, first, seen, first + seen > past + lane / G + 1, states[panel], own);
            const size_t weights = (seen + NUMBERS<X> - 1) / NUMBERS<X>;
            multiply_columns<X>((const Word *)scores, block.values.data(), weights, job.V, 1, job.V, own);
        }
    }
    for (size_t panel = 0; panel < panels; ++panel)
        finish_lanes(job, out + panel * job.V, states[panel], y.data() + panel * PANEL);
}

inline int64_t panels_of(const Job &job, const Segment &segment) {
    return (segment.count * (job.H / job.J) + PANEL - 1) / PANEL;
}
// Into how many units of work a segment falls for each key/value head.
inline int64_t units_of(const Job &job, const Segment &segment) {
    return segment.count <= FEW ? 1 : (panels_of(job, segment) + UNIT_PANELS - 1) / UNIT_PANELS;
}
inline int64_t all_units(const Job &job) {
    int64_t units = 0;
    for (int64_t at = 0; at < job.num_segments; ++at) units += units_of(job, job.segments[at]) * job.J;
    return units;
}

template <class T>
void share(const void *what, size_t part, size_t parts) {
    const Job &job = *(const Job *)what;
    thread_local std::vector<float> scratch;
    const int64_t units = all_units(job), from = units * part / parts, to = units * (part + 1) / parts;
    for (int64_t at = 0, first = 0; at < job.num_segments && first < to; ++at) {
        const Segment &segment = job.segments[at];
        const int64_t each = units_of(job, segment), panels = panels_of(job, segment);
        for (int64_t unit = std::max(first, from); unit < std::min(first + each * job.J, to); ++unit) {
            const int64_t j = (unit - first) / each, index = (unit - first) % each;
            if (segment.count <= FEW) one<T>(job, segment, j, scratch);
            else many<T>(job, segment, j, panels * index / each, panels * (index + 1) / each);
        }
        first += each * job.J;
    }
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
    const size_t units = all_units(job), times = units / (num_segments * J);  // that keys and values are read
    const size_t bytes = positions * J * (K + V) * (kind ? 2 : 4) * times;
    ((hive::Pool *)pool)->run(kind ? share<Bfloat> : share<float>, &job, bytes, units);
}
}
