// Products of many rows whose lanes are rows: arranged in panels, [K, PANEL], each number of the other side meets a whole
// vector of them, and no sum is ever taken over the lanes.
//
// What lies in a lane is a word of 32 bits: one float32, or two neighbours along K in bfloat16, where the processor
// multiplies these as they are. Where it does not, they are widened.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

using Word = uint32_t;
constexpr size_t PANEL = 2 * LANES;          // rows
constexpr int WIDTH = LANES == 16 ? 12 : 6;  // columns that meet a panel at once: sums and inputs fill the registers

#if defined(__AVX512BF16__)
template <class X>
using Panelled = X;  // as what inputs in X are multiplied
#else
template <class X>
using Panelled = float;
#endif
template <class X>
constexpr size_t NUMBERS = sizeof(Word) / sizeof(X);  // in a word
template <class X>
constexpr size_t words_of(size_t K) { return (K + NUMBERS<Panelled<X>> - 1) / NUMBERS<Panelled<X>>; }

// A panel of rows that lie `step` numbers apart. Those that are not there, and what K lacks of a word, are zero.
template <class X>
void panel_of(const X *x, size_t step, size_t rows, size_t K, Word *into) {
    using To = Panelled<X>;
    const size_t words = words_of<X>(K);
    size_t at = 0;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<X, To>)
        for (; (at + LANES) * NUMBERS<X> <= K; at += LANES)
            for (size_t side = 0; side < PANEL; side += LANES) {
                Floats square[LANES] = {};
                for (size_t row = side; row < std::min<size_t>(rows, side + LANES); ++row)
                    square[row - side] = load<Floats>(x + row * step + at * NUMBERS<X>);
                turn(square);
                for (int word = 0; word < LANES; ++word)
                    std::memcpy(into + (at + word) * PANEL + side, square + word, sizeof(Floats));
            }
#endif
    for (; at < words; ++at)
        for (size_t row = 0; row < PANEL; ++row) {
            To numbers[NUMBERS<To>] = {};
            for (size_t index = 0; index < NUMBERS<To> && row < rows; ++index)
                if (const size_t k = at * NUMBERS<To> + index; k < K) {
                    if constexpr (std::is_same_v<X, To>) numbers[index] = x[row * step + k];
                    else numbers[index] = number(x[row * step + k]);
                }
            std::memcpy(into + at * PANEL + row, numbers, sizeof(Word));
        }
}

template <class X>
inline Floats grown(Floats total, Floats left, const Word *word) {
#if defined(__AVX512BF16__)
    if constexpr (NUMBERS<X> == 2)
        return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)left, (__m512bh)_mm512_set1_epi32(load<int>(word)));
#endif
    return total + left * load<float>(word);
}

// `sums` grow by `length` words of a panel and of columns; where these lie: `columns_step` from one to the next, `step`
// along K.
template <class X, int columns, int vectors>
inline void multiply_panel(const Word *x, const Word *w, size_t length, size_t column_step, size_t step,
                           Floats (*sums)[2]) {
    Floats total[columns][vectors] = {};
    for (size_t k = 0; k < length; ++k) {
        Floats left[vectors];
        for (int at = 0; at < vectors; ++at) left[at] = load<Floats>(x + k * PANEL + at * LANES);
        for (int column = 0; column < columns; ++column)
            for (int at = 0; at < vectors; ++at)
                total[column][at] = grown<X>(total[column][at], left[at], w + column * column_step + k * step);
    }
    for (int column = 0; column < columns; ++column)
        for (int at = 0; at < vectors; ++at) sums[column][at] += total[column][at];
}

}  // namespace
