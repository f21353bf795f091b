/* What is stored in words (`bivlm.packing.radix`) and in gaps (`bivlm.packing.sparse`), made readable. */

#include "native.h"

enum { MOST_PLANES = 4 }; /* of words of up to 16 bits */

/* A row's words looked up in the table: `size` bytes each, of the last one as many as are left. */
static inline __attribute__((always_inline)) void look_up_row(const uint8_t *const *planes, const int64_t *widths,
                                                              int count, int64_t words, const uint8_t *table,
                                                              const int64_t size, uint8_t *out, int64_t last) {
    for (int64_t i = 0; i < words; i++) {
        uint32_t word = 0;
        for (int p = count - 1; p >= 0; p--) {
            const int64_t width = widths[p], bit = i * width;
            word = word << width | (planes[p][bit >> 3] >> (bit & 7) & ((1u << width) - 1));
        }
        memcpy(out + i * size, table + word * size, (size_t)(i + 1 < words ? size : last));
    }
}

/* The same with a size that the compiler knows. Whole words are whole bytes where there is one plane. */
#define SIZES(SIZE) SIZE(1) SIZE(2) SIZE(3) SIZE(4) SIZE(5) SIZE(6) SIZE(8) SIZE(10) SIZE(12) SIZE(16) SIZE(20) SIZE(32)
#define SIZE(n)                                                                                                     \
    case n:                                                                                                         \
        if (count == 1 && widths[0] == 8) {                                                                         \
            for (int64_t i = 0; i + 1 < words; i++) memcpy(to + i * n, table + at[0][i] * n, n);                    \
            memcpy(to + (words - 1) * n, table + at[0][words - 1] * n, (size_t)last);                               \
        } else                                                                                                      \
            look_up_row(at, widths, (int)count, words, table, n, to, last);                                         \
        break;

/* out[rows][columns], of values of some bytes: rows from `first` to `end` of words in planes, of which each has so many
   bytes a row and bits a word; table[words][per_word]. */
EXPORT void bivlm_look_up_words(const uint8_t *const *planes, const int64_t *row_bytes, const int64_t *widths,
                                int64_t count, int64_t first, int64_t end, int64_t columns, int64_t per_word,
                                const uint8_t *table, int64_t value_bytes, uint8_t *out) {
    const int64_t words = (columns + per_word - 1) / per_word, size = per_word * value_bytes;
    const int64_t last = (columns - (words - 1) * per_word) * value_bytes;
    for (int64_t row = first; row < end; row++) {
        const uint8_t *at[MOST_PLANES] = {0};
        for (int p = 0; p < count; p++) at[p] = planes[p] + row * row_bytes[p];
        uint8_t *to = out + row * columns * value_bytes;
        switch (size) {
            SIZES(SIZE)
        default: look_up_row(at, widths, (int)count, words, table, size, to, last);
        }
    }
}

/* The symbols at some positions, counted row by row. */
EXPORT void bivlm_symbols_at(const uint8_t *const *planes, const int64_t *row_bytes, const int64_t *widths, int64_t count,
                             int64_t columns, int64_t per_word, int64_t symbols, const int64_t *positions, int64_t number,
                             int64_t *found) {
    for (int64_t i = 0; i < number; i++) {
        const int64_t row = positions[i] / columns, column = positions[i] - row * columns, place = column / per_word;
        uint32_t word = 0;
        for (int p = (int)count - 1; p >= 0; p--) {
            const int64_t width = widths[p], bit = place * width;
            word = word << width | (planes[p][row * row_bytes[p] + (bit >> 3)] >> (bit & 7) & ((1u << width) - 1));
        }
        for (int64_t digit = column - place * per_word; digit > 0; digit--) word /= (uint32_t)symbols;
        found[i] = word % (uint32_t)symbols;
    }
}

static inline int lowest_one(unsigned byte) {
#ifdef __GNUC__
    return __builtin_ctz(byte);
#else
    int at = 0;
    while (!(byte >> at & 1)) at++;
    return at;
#endif
}

/* Positions of `count` salient weights from their gaps: unary quotients, whose ends are ones, and k-bit remainders. */
EXPORT void bivlm_positions(const uint8_t *unary, int64_t nbytes, const uint8_t *remainders, int64_t remainder_bytes,
                            int64_t count, int64_t k, int64_t *positions) {
    int64_t found = 0, before = -1, position = -1;
    for (int64_t byte = 0; byte < nbytes && found < count; byte++)
        for (unsigned ones = unary[byte]; ones && found < count; ones &= ones - 1) {
            const int64_t end = 8 * byte + lowest_one(ones), first = found * k;
            uint64_t gap = 0;
            for (int64_t at = first >> 3, got = -(first & 7); got < k && at < remainder_bytes; at++, got += 8)
                gap |= got < 0 ? (uint64_t)remainders[at] >> -got : (uint64_t)remainders[at] << got;
            gap = (k < 64 ? gap & ((1ull << k) - 1) : gap) + ((uint64_t)(end - before - 1) << k);
            before = end;
            position += (int64_t)gap + 1;
            positions[found++] = position;
        }
}
