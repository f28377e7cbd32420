// A whole short forward in one call: a list of instructions over strided tensors, written once by peers/runtime/tape.py.
//
// Why it exists: one token through a layer is about fifty tiny operations, and torch and Python take longer to start each
// of them than it takes to do it. Nothing is fused: every instruction is one operation of the model's own code, computed
// in float32 and rounded to the dtype of its output, as torch does it.

#include <cmath>
#include <cstring>

#include "pool.h"
#include "vectors.h"

extern "C" {
void hive_linear(void *, int, int, const void *, const void *, const void *, const float *, void *, size_t, size_t,
                 size_t);
void hive_attend(void *, int, const void *, const void *, const void *, void *, const int64_t *, int64_t, const int64_t *,
                 const float *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                 float, float, int64_t);
}

namespace {

enum Dtype : int64_t { FLOAT32, BFLOAT16, INT64 };
enum Op : int64_t {
    LINEAR, ATTEND, COPY, ADD, SUB, MUL, DIV, NEG, SQUARE, CUBE, RSQRT, SILU, GELU, GELU_TANH, SIGMOID, TANH, RELU, COS,
    SIN, MEAN, LAYER_NORM
};

struct Operand {  // up to four dimensions; those it lacks have size 1, those it is repeated along have stride 0
    int64_t base, offset, dtype, size[4], stride[4];  // offset in bytes, strides in values
};
struct Instruction {
    int64_t op, operands;
    double numbers[2];
    int64_t extra[13];
    Operand out, in[3];
};
struct Visits {
    const int64_t *segments;
    int64_t num_segments;
    const int64_t *runs;
    int64_t positions;
    const int64_t *slots;  // where each position's keys and values go
};

constexpr size_t WIDTHS[] = {4, 2, 8};

// One row of an operand as float32: where it lies, or gathered.
const float *row_of(const Operand &operand, const char *at, int64_t count, float *room) {
    const int64_t step = operand.stride[3];
    if (operand.dtype == FLOAT32) {
        const float *from = (const float *)at;
        if (step == 1) return from;
        for (int64_t index = 0; index < count; ++index) room[index] = from[index * step];
    } else if (operand.dtype == BFLOAT16) {
        const Bfloat *from = (const Bfloat *)at;
        int64_t index = 0;
        if (step == 1)
            for (; index + LANES <= count; index += LANES) store(room + index, floats(from + index));
        for (; index < count; ++index) room[index] = number(from[index * step]);
    } else {
        const int64_t *from = (const int64_t *)at;
        for (int64_t index = 0; index < count; ++index) room[index] = float(from[index * step]);
    }
    return room;
}

// y = f(x) by whole vectors, for functions of x <= 0 that exist only as those.
template <class Function>
void vectors(const float *x, float *y, int64_t count, Function function) {
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) {
        Floats value = function(floats(x + at));
        std::memcpy(y + at, &value, sizeof value);
    }
    if (at < count) {
        float rest[LANES] = {};
        std::memcpy(rest, x + at, (count - at) * sizeof(float));
        Floats value = function(floats(rest));
        std::memcpy(y + at, &value, (count - at) * sizeof(float));
    }
}

float sum(const float *x, int64_t count) {
    Floats total[4] = {};
    int64_t at = 0;
    for (; at + 4 * LANES <= count; at += 4 * LANES)
        for (int turn = 0; turn < 4; ++turn) total[turn] += floats(x + at + turn * LANES);
    Floats all = (total[0] + total[1]) + (total[2] + total[3]);
    float result;
    sums<1>(&all, &result);
    for (; at < count; ++at) result += x[at];
    return result;
}

void compute(const Instruction &code, const float *a, const float *b, const float *c, float *y, int64_t n) {
#define EACH(value) for (int64_t i = 0; i < n; ++i) y[i] = (value); return
    switch (code.op) {
        case COPY: EACH(a[i]);
        case ADD: EACH(a[i] + b[i]);
        case SUB: EACH(a[i] - b[i]);
        case MUL: EACH(a[i] * b[i]);
        case DIV: EACH(a[i] / b[i]);
        case NEG: EACH(-a[i]);
        case SQUARE: EACH(a[i] * a[i]);
        case CUBE: EACH(a[i] * a[i] * a[i]);
        case RSQRT: EACH(1.0f / std::sqrt(a[i]));
        case RELU: EACH(a[i] > 0 ? a[i] : 0.0f);
        case COS: EACH(std::cos(a[i]));
        case SIN: EACH(std::sin(a[i]));
        case GELU: EACH(0.5f * a[i] * (1.0f + std::erf(a[i] * float(M_SQRT1_2))));
        case SIGMOID: return vectors(a, y, n, sigmoid);
        case TANH: return vectors(a, y, n, tanh_of);
        case SILU: return vectors(a, y, n, [](Floats x) { return x * sigmoid(x); });
        case GELU_TANH:
            return vectors(a, y, n, [](Floats x) {
                return 0.5f * x * (1.0f + tanh_of(0.7978845608f * (x + 0.044715f * x * x * x)));
            });
        case LAYER_NORM: {
            float mean = sum(a, n) / n;
            for (int64_t i = 0; i < n; ++i) y[i] = (a[i] - mean) * (a[i] - mean);
            float scale = 1.0f / std::sqrt(sum(y, n) / n + float(code.numbers[0]));
            for (int64_t i = 0; i < n; ++i) y[i] = (a[i] - mean) * scale;
            if (b) for (int64_t i = 0; i < n; ++i) y[i] *= b[i];
            if (c) for (int64_t i = 0; i < n; ++i) y[i] += c[i];
            return;
        }
    }
#undef EACH
}

char *place(const Operand &operand, char *const *bases) {
    return operand.base < 0 ? (char *)operand.offset : bases[operand.base] + operand.offset;
}

struct Rows {
    const Instruction &code;
    char *const *bases;
};

int64_t rows_of(const Instruction &code) {
    const int64_t *size = code.op == MEAN ? code.in[0].size : code.out.size;
    return size[0] * size[1] * size[2];
}

// Part of an instruction's rows; no two of them write to the same place.
void by_rows(const void *what, size_t part, size_t parts) {
    thread_local std::vector<float> room;
    const Instruction &code = ((const Rows *)what)->code;
    char *const *bases = ((const Rows *)what)->bases;
    const bool mean = code.op == MEAN;
    const int64_t *size = mean ? code.in[0].size : code.out.size, count = size[3];
    room.resize(4 * count);
    float *rooms[] = {room.data(), room.data() + count, room.data() + 2 * count};
    float *const spare = room.data() + 3 * count, number_of_row = float(code.numbers[0]);
    const bool scalar = code.op >= ADD && code.op <= DIV && code.operands == 1;
    if (scalar) std::fill_n(rooms[1], count, number_of_row);
    char *const out = place(code.out, bases);
    char *in[3] = {};
    for (int index = 0; index < code.operands; ++index) in[index] = place(code.in[index], bases);
    const int64_t all = rows_of(code), begin = all * int64_t(part) / int64_t(parts);
    int64_t i = begin / (size[1] * size[2]), j = begin / size[2] % size[1], k = begin % size[2];
    for (int64_t left = all * int64_t(part + 1) / int64_t(parts) - begin; left; --left) {
        const auto at = [&](const Operand &operand, char *start) {
            const int64_t *stride = operand.stride;
            return start + (i * stride[0] + j * stride[1] + k * stride[2]) * int64_t(WIDTHS[operand.dtype]);
        };
        const float *rows[3] = {nullptr, scalar ? rooms[1] : nullptr, nullptr};
        for (int index = 0; index < code.operands; ++index)
            rows[index] = row_of(code.in[index], at(code.in[index], in[index]), count, rooms[index]);
        char *to = at(code.out, out);
        if (++k == size[2]) {
            k = 0;
            if (++j == size[1]) j = 0, ++i;
        }
        const bool direct = code.out.dtype == FLOAT32 && (code.out.stride[3] == 1 || mean);
        float *y = direct ? (float *)to : spare;
        if (mean) *y = sum(rows[0], count) / count;
        else compute(code, rows[0], rows[1], rows[2], y, count);
        if (direct) continue;
        const int64_t step = code.out.stride[3], values = mean ? 1 : count;
        int64_t x = 0;
        if (code.out.dtype == BFLOAT16 && step == 1)
            for (; x + LANES <= values; x += LANES) store((Bfloat *)to + x, floats(y + x));
        for (; x < values; ++x)
            if (code.out.dtype == BFLOAT16) store((Bfloat *)to + x * step, y[x]);
            else store((float *)to + x * step, y[x]);
    }
}

// New keys or values of every head, [1, J, T, K], to their slots of a pool, [J, slots, K] with the given strides.
void keep(const Operand &rows, const char *from, char *pool, int64_t head, int64_t slot, const int64_t *slot_of) {
    const size_t width = WIDTHS[rows.dtype];
    const int64_t J = rows.size[1], T = rows.size[2], K = rows.size[3];
    for (int64_t j = 0; j < J; ++j)
        for (int64_t t = 0; t < T; ++t) {
            const char *row = from + (j * rows.stride[1] + t * rows.stride[2]) * width;
            char *to = pool + (j * head + slot_of[t] * slot) * width;
            if (rows.stride[3] == 1) std::memcpy(to, row, K * width);
            else
                for (int64_t k = 0; k < K; ++k) std::memcpy(to + k * width, row + k * rows.stride[3] * width, width);
        }
}

}  // namespace

extern "C" {

// Called by peers/model/kernels/pool.py. A negative base makes an operand's offset an address; visits: one per pattern
// of attention and table of pages.
void hive_run(void *pool, const void *instructions, int64_t count, char *const *bases, const void *visits) {
    for (const Instruction *code = (const Instruction *)instructions, *end = code + count; code < end; ++code) {
        const int64_t *extra = code->extra;
        switch (code->op) {
            case LINEAR:  // inputs, format, weights, scales, bias, M, N, K
                hive_linear(pool, int(extra[0]), int(extra[1]), place(code->in[0], bases), (void *)extra[2],
                            (void *)extra[3], (float *)extra[4], place(code->out, bases), extra[5], extra[6], extra[7]);
                break;
            case ATTEND: {  // kind, keys, values, sinks, H, J, K, V, strides of keys and of values, visits
                const Operand &q = code->in[0];
                const int64_t *keys = extra + 8, *values = extra + 10;
                const Visits &seen = ((const Visits *)visits)[extra[12]];
                keep(code->in[1], place(code->in[1], bases), (char *)extra[1], keys[0], keys[1], seen.slots);
                keep(code->in[2], place(code->in[2], bases), (char *)extra[2], values[0], values[1], seen.slots);
                hive_attend(pool, int(extra[0]), place(q, bases), (void *)extra[1], (void *)extra[2],
                            place(code->out, bases), seen.segments, seen.num_segments, seen.runs, (float *)extra[3],
                            extra[4], extra[5], extra[6], extra[7], q.stride[1], q.stride[2], keys[0], keys[1],
                            values[0], values[1], float(code->numbers[0]), float(code->numbers[1]), seen.positions);
                break;
            }
            default: {
                const Rows rows{*code, bases};
                const size_t bytes = rows_of(*code) * code->out.size[3] * WIDTHS[code->out.dtype] * (1 + code->operands);
                ((hive::Pool *)pool)->run(by_rows, &rows, bytes, rows_of(*code));
            }
        }
    }
}
}
