/* Products with a weight on a trellis whose states have 12 bits, straight from its bits.

   Four steps take `quarters` bits, a group. The states of 16 steps with the same place among four are made at once from
   the groups, 16 bits each, and from their three windows of four bits, by shuffles, what their levels are. A line is a
   column of a band of rows, or an antidiagonal, along which the input is read backwards. Of several lines the levels
   lie side by side, so that rows of the output are read and written once for all of them. */

#include "native.h"

enum {
    LONGEST = 256,       /* numbers of a tile */
    FEWEST_ROWS = 64,    /* of a band whose tiles are single columns */
    STEPS = LONGEST / 4,
    TILE_BYTES = 128,    /* that may be read from a tile's first byte on, whatever its length; before it four */
    STATE_BITS = 12,
    LINES = 8,
    NEGATIVE = 128,
    BESIDE = 32,
    AHEAD = 4096 /* bytes that memory is asked for before they are read */
};

/* An antidiagonal or column: its number, its first row that is not there yet, and how many rows are still to come. */
typedef struct {
    int64_t number, row, left;
} Line;

static inline Line diagonal(int64_t number, int64_t rows, int64_t columns) {
    const int64_t row = number < columns ? 0 : number - columns + 1;
    return (Line){number, row, (number < rows ? number : rows - 1) - row + 1};
}

typedef struct {
    int quarters;
    uint8_t nibbles[2 * 3 * 16]; /* places, of which bit 4 lies in bit 7, and bit 5 in bit 6, see `levels_of_places` */
    uint8_t wide_nibbles[2 * 3 * 16]; /* places as they are */
    uint8_t of_place[64];           /* the level of each place, and NEGATIVE */
    const float *magnitudes; /* [8] */
    const float *inputs;     /* [tokens][in_apart] */
    float *outputs;          /* [tokens][out_apart] */
    int64_t tokens, in_apart, out_apart, levels_apart;
    uint8_t *levels;                     /* [LINES][levels_apart], the number of each, whose bit 3 is its sign, and NEGATIVE */
    int lines, constant;                 /* how many lines there are, and whether a line has one input for all rows */
    int64_t first[LINES], last[LINES];   /* rows of each, the last one exclusive */
    int64_t at[LINES];                   /* place of its input, from which the rows count unless it is constant */
    /* Of eight groups, the first of which begins at each bit of a byte: where their bytes lie, and the shift. */
    int8_t bytes_of[8][32];
    int32_t down[8][8];
    int8_t first_bytes_of[32]; /* of the first eight of a tile, whose bits lie behind 32 others */
    int32_t first_down[8];
} Product;

static void product_tables(Product *by, int quarters, const uint8_t *nibbles, const uint8_t *of_place) {
    by->quarters = quarters;
    for (int k = 0; k < 96; k++) {
        const uint8_t place = nibbles[k];
        by->wide_nibbles[k] = place;
        by->nibbles[k] = (uint8_t)((place & 15) | (place >> 4 & 1) << 7 | (place >> 5 & 1) << 6);
    }
    for (int k = 0; k < 64; k++) by->of_place[k] = (uint8_t)(of_place[k] | (of_place[k] & 8 ? NEGATIVE : 0));
    for (int bit = 0; bit < 8; bit++)
        for (int k = 0; k < 8; k++) {
            const int at = ((bit + (k < 4 ? 0 : 4 * quarters)) & 7) + quarters * (k & 3) + 8;
            for (int b = 0; b < 4; b++) by->bytes_of[bit][4 * k + b] = (int8_t)((at >> 3) + 3 - b);
            by->down[bit][k] = 8 - (at & 7);
        }
    for (int k = 0; k < 8; k++) {
        const int at = quarters * (k + 1) + 8;
        for (int b = 0; b < 4; b++) by->first_bytes_of[4 * k + b] = (int8_t)((at >> 3) + 3 - b);
        by->first_down[k] = 8 - (at & 7);
    }
}

#ifdef X86
#define FMA __attribute__((target("avx2,fma")))

/* Sixteen by sixteen, the sixteen bits that end with each group of a tile, and those that end with the group before. Of
   those that end before a group begins twelve are right. */
typedef struct {
    __m256i at[STEPS / 16], before[STEPS / 16];
} Windows;

FMA static inline __m256i eight_windows(__m128i low, __m128i high, const int8_t *bytes_of, const int32_t *down) {
    const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    const __m256i four = _mm256_shuffle_epi8(bytes, _mm256_loadu_si256((const __m256i *)bytes_of));
    const __m256i found = _mm256_srlv_epi32(four, _mm256_loadu_si256((const __m256i *)down));
    return _mm256_and_si256(found, _mm256_set1_epi32(65535));
}

FMA static inline __attribute__((always_inline)) void read_windows(const Product *by, const uint8_t *stream, int64_t bit,
                                                                   const int quarters, int64_t length, Windows *found) {
    /* Before the first bits lie the last ones. */
    const int64_t bits = (length * quarters + 3) / 4;
    const uint64_t seam = length < SHORTEST ? 0 : word(stream, bit + bits - STATE_BITS) >> (64 - STATE_BITS);
    const uint64_t first = seam << 32 | word(stream, bit) >> 32;
    const uint64_t second = word(stream, bit + 32) >> 32 << 32 | word(stream, bit + 64) >> 32;
    const __m128i begin =
        _mm_set_epi64x((int64_t)__builtin_bswap64(second), (int64_t)__builtin_bswap64(first));
    __m256i last = _mm256_set1_epi16((int16_t)seam);
    bit += quarters - 32;
#pragma GCC unroll 4
    for (int k = 0; k < STEPS / 16; k++) {
        __m256i half[2];
        for (int h = 0; h < 2; h++, bit += 8 * quarters) {
            const uint8_t *high = stream + ((bit + 4 * quarters) >> 3);
            if (k + h)
                half[h] = eight_windows(_mm_loadu_si128((const __m128i *)(stream + (bit >> 3))),
                                        _mm_loadu_si128((const __m128i *)high), by->bytes_of[bit & 7],
                                        by->down[bit & 7]);
            else
                half[h] = eight_windows(begin, begin, by->first_bytes_of, by->first_down);
        }
        found->at[k] = _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xD8);
        found->before[k] = _mm256_alignr_epi8(found->at[k], _mm256_permute2x128_si256(last, found->at[k], 0x21), 14);
        last = found->at[k];
    }
}

/* The states of 16 steps, with bits above them: those of a window and, where it has too few, of the one before it. */
FMA static inline __m256i states_at(__m256i at, __m256i before, const int quarters, const int end) {
    const __m256i state = _mm256_srli_epi16(at, quarters - end);
    if (quarters - end <= 16 - STATE_BITS) return state;
    return _mm256_or_si256(state, _mm256_slli_epi16(before, end));
}

FMA static inline __m256i sixteen_bytes(const uint8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}

/* A shuffle takes the four lowest bits, and gives zero where the highest one is set: so two of them know 32 places. */
FMA static inline __m256i levels_of_places(const Product *by, __m256i place) {
    const __m256i other = _mm256_xor_si256(place, _mm256_set1_epi8(-128));
    const __m256i low = _mm256_or_si256(_mm256_shuffle_epi8(sixteen_bytes(by->of_place), place),
                                        _mm256_shuffle_epi8(sixteen_bytes(by->of_place + 16), other));
    const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(sixteen_bytes(by->of_place + 32), place),
                                         _mm256_shuffle_epi8(sixteen_bytes(by->of_place + 48), other));
    return _mm256_blendv_epi8(low, high, _mm256_add_epi8(place, place));
}

FMA static inline __attribute__((always_inline)) void levels_at(const Product *by, const uint8_t *stream, int64_t bit,
                                                                int64_t length, const int quarters, uint8_t *levels) {
    Windows windows;
    read_windows(by, stream, bit, quarters, length, &windows);
    const __m256i byte = _mm256_set1_epi16(255), low = _mm256_set1_epi8(15);
#pragma GCC unroll 2
    for (int m = 0; m < STEPS; m += 32) {
        __m256i found[4];
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            const int end = (quarters * (p + 1) + 3) / 4;
            const uint8_t *tables = by->nibbles + (end == (quarters * p + 3) / 4 ? 48 : 0);
            const __m256i a = states_at(windows.at[m / 16], windows.before[m / 16], quarters, end);
            const __m256i b = states_at(windows.at[m / 16 + 1], windows.before[m / 16 + 1], quarters, end);
            const __m256i newer = _mm256_packus_epi16(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
            const __m256i older = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
#define TABLE(k) sixteen_bytes(tables + 16 * k)
            const __m256i place = _mm256_xor_si256(
                _mm256_xor_si256(
                    _mm256_shuffle_epi8(TABLE(0), _mm256_and_si256(newer, low)),
                    _mm256_shuffle_epi8(TABLE(1), _mm256_and_si256(_mm256_srli_epi16(newer, 4), low))),
                _mm256_shuffle_epi8(TABLE(2), _mm256_and_si256(older, low)));
#undef TABLE
            found[p] = levels_of_places(by, place);
        }
        /* Steps m to m + 8, m + 16 to m + 24, then those between: four by four into their order. */
        const __m256i a = _mm256_unpacklo_epi8(found[0], found[1]), b = _mm256_unpacklo_epi8(found[2], found[3]);
        const __m256i c = _mm256_unpackhi_epi8(found[0], found[1]), d = _mm256_unpackhi_epi8(found[2], found[3]);
        const __m256i parts[4] = {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b),
                                  _mm256_unpacklo_epi16(c, d), _mm256_unpackhi_epi16(c, d)};
        for (int k = 0; k < 4; k++) {
            const int64_t step = m + 4 * (k & 1) + 16 * (k >> 1);
            _mm_storeu_si128((__m128i *)(levels + 4 * step), _mm256_castsi256_si128(parts[k]));
            _mm_storeu_si128((__m128i *)(levels + 4 * step + 32), _mm256_extracti128_si256(parts[k], 1));
        }
    }
}

/* The same, a whole tile at once. */
#define WIDE __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vbmi")))
WIDE static inline __m512i joined(const __m256i *two) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(two[0]), two[1], 1);
}

WIDE static inline __m512i wide_states_at(const Windows *windows, int k, const int quarters, const int end) {
    const __m512i state = _mm512_srli_epi16(joined(windows->at + k), (unsigned)(quarters - end));
    if (quarters - end <= 16 - STATE_BITS) return state;
    return _mm512_or_si512(state, _mm512_slli_epi16(joined(windows->before + k), (unsigned)end));
}

WIDE static inline __attribute__((always_inline)) void wide_levels_at(const Product *by, const uint8_t *stream,
                                                                      int64_t bit, int64_t length, const int quarters,
                                                                      uint8_t *levels) {
    Windows windows;
    read_windows(by, stream, bit, quarters, length, &windows);
    const __m512i byte = _mm512_set1_epi16(255), low = _mm512_set1_epi8(15);
    const __m512i of_place = _mm512_loadu_si512(by->of_place);
    __m512i found[4];
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        const int end = (quarters * (p + 1) + 3) / 4;
        const uint8_t *tables = by->wide_nibbles + (end == (quarters * p + 3) / 4 ? 48 : 0);
        const __m512i a = wide_states_at(&windows, 0, quarters, end);
        const __m512i b = wide_states_at(&windows, 2, quarters, end);
        const __m512i newer = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
        const __m512i older = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
#define TABLE(k) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(tables + 16 * k)))
        const __m512i place = _mm512_ternarylogic_epi64(
            _mm512_shuffle_epi8(TABLE(0), _mm512_and_si512(newer, low)),
            _mm512_shuffle_epi8(TABLE(1), _mm512_and_si512(_mm512_srli_epi16(newer, 4), low)),
            _mm512_shuffle_epi8(TABLE(2), _mm512_and_si512(older, low)), 0x96);
#undef TABLE
        found[p] = _mm512_permutexvar_epi8(place, of_place);
    }
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i pairs[4] = {
        _mm512_unpacklo_epi8(found[0], found[1]), _mm512_unpacklo_epi8(found[2], found[3]),
        _mm512_unpackhi_epi8(found[0], found[1]), _mm512_unpackhi_epi8(found[2], found[3])};
    for (int k = 0; k < 4; k += 2) {
        const __m512i four = _mm512_unpacklo_epi16(pairs[k], pairs[k + 1]);
        const __m512i next = _mm512_unpackhi_epi16(pairs[k], pairs[k + 1]);
        _mm512_storeu_si512(levels + 64 * k, _mm512_permutex2var_epi64(four, first, next));
        _mm512_storeu_si512(levels + 64 * k + 64, _mm512_permutex2var_epi64(four, second, next));
    }
}

/* The same at two bits a step, where a byte is four of them: of each step the newest window is four bits of the byte, or
   of it and the one before, and the others are those of two and of four steps earlier, so that what tables say of them
   is made once for the bytes and moved on by one. */
WIDE static inline __m512i bytes_from(const uint8_t *stream, int64_t bit) {
    const __m512i here = _mm512_loadu_si512(stream + (bit >> 3));
    const int by = (int)(bit & 7);
    if (!by) return here;
    const __m512i next = _mm512_loadu_si512(stream + (bit >> 3) + 1);
    const __m128i left = _mm_cvtsi32_si128(by), right = _mm_cvtsi32_si128(8 - by);
    const __m512i kept = _mm512_set1_epi8((char)(255 << by));
    return _mm512_ternarylogic_epi32(kept, _mm512_sll_epi16(here, left), _mm512_srl_epi16(next, right), 0xCA);
}

WIDE static void two_bit_levels(const Product *by, const uint8_t *stream, int64_t bit, int64_t length, uint8_t *levels) {
    const uint64_t seam = length < SHORTEST ? 0 : word(stream, bit + 2 * length - STATE_BITS) >> (64 - STATE_BITS);
    const __m512i low = _mm512_set1_epi8(15), bytes = bytes_from(stream, bit);
    const __m512i before = _mm512_setr_epi64(
        0x0605040302010063, 0x0E0D0C0B0A090807, 0x161514131211100F, 0x1E1D1C1B1A191817, 0x262524232221201F,
        0x2E2D2C2B2A292827, 0x363534333231302F, 0x3E3D3C3B3A393837);
    const uint8_t *tables = by->wide_nibbles;
#define TABLE(k) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(tables + 16 * k)))
#define MOVED_ON(v, first) _mm512_mask_mov_epi8(_mm512_permutexvar_epi8(before, v), 1, _mm512_set1_epi8((char)(first)))
#define SAID(k, of) _mm512_shuffle_epi8(table[k], of)
#define SAID_BEFORE(k, down) tables[16 * k + (seam >> (down) & 15)]
#define ALL(a, b, c) _mm512_ternarylogic_epi64(a, b, c, 0x96)
    const __m512i table[3] = {TABLE(0), TABLE(1), TABLE(2)};
    /* The windows that end with each of a byte's four steps. */
    const __m512i last_byte = MOVED_ON(bytes, seam);
    const __m512i first = _mm512_and_si512(
        low, _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), _mm512_srli_epi16(bytes, 6), _mm512_slli_epi16(last_byte, 2), 0xCA));
    const __m512i second = _mm512_and_si512(low, _mm512_srli_epi16(bytes, 4));
    const __m512i third = _mm512_and_si512(low, _mm512_srli_epi16(bytes, 2)), fourth = _mm512_and_si512(low, bytes);
    const __m512i place[4] = {
        _mm512_xor_si512(SAID(0, first), MOVED_ON(_mm512_xor_si512(SAID(1, third), SAID(2, first)),
                                                  SAID_BEFORE(1, 2) ^ SAID_BEFORE(2, 6))),
        _mm512_xor_si512(SAID(0, second), MOVED_ON(_mm512_xor_si512(SAID(1, fourth), SAID(2, second)),
                                                   SAID_BEFORE(1, 0) ^ SAID_BEFORE(2, 4))),
        ALL(SAID(0, third), SAID(1, first), MOVED_ON(SAID(2, third), SAID_BEFORE(2, 2))),
        ALL(SAID(0, fourth), SAID(1, second), MOVED_ON(SAID(2, fourth), SAID_BEFORE(2, 0)))};
#undef TABLE
#undef MOVED_ON
#undef SAID
#undef SAID_BEFORE
#undef ALL
    const __m512i of_place = _mm512_loadu_si512(by->of_place);
    __m512i found[4];
    for (int p = 0; p < 4; p++) found[p] = _mm512_permutexvar_epi8(place[p], of_place);
    /* Sixteen bytes' steps lie in a quarter of each: four by four into their order. */
    const __m512i a = _mm512_unpacklo_epi8(found[0], found[1]), b = _mm512_unpacklo_epi8(found[2], found[3]);
    const __m512i c = _mm512_unpackhi_epi8(found[0], found[1]), d = _mm512_unpackhi_epi8(found[2], found[3]);
    const __m512i parts[4] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b), _mm512_unpacklo_epi16(c, d),
                              _mm512_unpackhi_epi16(c, d)};
#define QUARTER(k) \
    for (int part = 0; part < 4; part++) \
        _mm_storeu_si128((__m128i *)(levels + 64 * (k) + 16 * part), _mm512_extracti32x4_epi32(parts[part], k));
    QUARTER(0) QUARTER(1) QUARTER(2) QUARTER(3)
#undef QUARTER
}

/* The levels of a tile's steps, and up to 127 more: by a function for every rate, with constant shifts. */
#define EVERY_RATE(AT) AT(2) AT(3) AT(4) AT(5) AT(6) AT(7) AT(8) AT(9) AT(10) AT(11) AT(12)
#define AT(quarters) case quarters: levels_at(by, stream, bit, length, quarters, levels); break;
FMA static void read_levels(const Product *by, const uint8_t *stream, int64_t bit, int64_t length, uint8_t *levels) {
    switch (by->quarters) { EVERY_RATE(AT) }
}
#undef AT
#define AT(quarters) case quarters: wide_levels_at(by, stream, bit, length, quarters, levels); break;
WIDE static void read_levels_wide(const Product *by, const uint8_t *stream, int64_t bit, int64_t length, uint8_t *levels) {
    if (by->quarters == 8) {
        two_bit_levels(by, stream, bit, length, levels);
        return;
    }
    switch (by->quarters) { EVERY_RATE(AT) }
}
#undef AT

/* Add what eight lines make up to their rows, of which each line begins with one of `first` to `first + 8`. */
FMA static void add_lines(const Product *by, int64_t first, int64_t last) {
    const __m256 magnitudes = _mm256_loadu_ps(by->magnitudes), sign = _mm256_set1_ps(-0.0f);
    const __m256i eight = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int64_t i = first; i < last; i += 8) {
        const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(last - i)), eight);
        __m256 level[LINES];
#pragma GCC unroll 8
        for (int k = 0; k < LINES; k++) {
            const __m128i some = _mm_loadl_epi64((const __m128i *)(by->levels + k * by->levels_apart + i));
            const __m256i number = _mm256_cvtepi8_epi32(some);
            level[k] = _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, number),
                                     _mm256_and_ps(_mm256_castsi256_ps(number), sign));
        }
        for (int64_t token = 0; token < by->tokens; token++) {
            const float *x = by->inputs + token * by->in_apart;
            float *y = by->outputs + token * by->out_apart + i;
            __m256 even = _mm256_loadu_ps(y), odd = _mm256_setzero_ps();
            if (by->constant)
#pragma GCC unroll 4
                for (int k = 0; k < LINES; k += 2) {
                    even = _mm256_fmadd_ps(level[k], _mm256_broadcast_ss(x + by->at[k]), even);
                    odd = _mm256_fmadd_ps(level[k + 1], _mm256_broadcast_ss(x + by->at[k + 1]), odd);
                }
            else
#pragma GCC unroll 4
                for (int k = 0; k < LINES; k += 2) {
                    even = _mm256_fmadd_ps(level[k], _mm256_loadu_ps(x + by->at[k] + i), even);
                    odd = _mm256_fmadd_ps(level[k + 1], _mm256_loadu_ps(x + by->at[k + 1] + i), odd);
                }
            _mm256_maskstore_ps(y, lanes, _mm256_add_ps(even, odd));
        }
    }
}

/* The same: each line's inputs are those of the line before it, from one place earlier on. */
#define INPUT(k) _mm512_castsi512_ps(_mm512_alignr_epi32(next, here, LINES - 1 - (k)))

WIDE static void add_lines_wide(const Product *by, int64_t first, int64_t last) {
    const __m256 magnitudes = _mm256_loadu_ps(by->magnitudes);
    const __m512 levels = _mm512_insertf32x8(_mm512_castps256_ps512(magnitudes),
                                             _mm256_xor_ps(magnitudes, _mm256_set1_ps(-0.0f)), 1);
    for (int64_t i = first; i < last; i += 16) {
        const __mmask16 lanes = (__mmask16)(last - i < 16 ? (1 << (last - i)) - 1 : 65535);
        __m512 level[LINES];
#pragma GCC unroll 8
        for (int k = 0; k < LINES; k++) {
            const __m128i some = _mm_loadu_si128((const __m128i *)(by->levels + k * by->levels_apart + i));
            level[k] = _mm512_permutexvar_ps(_mm512_cvtepi8_epi32(some), levels);
        }
        for (int64_t token = 0; token < by->tokens; token++) {
            const float *x = by->inputs + token * by->in_apart;
            float *y = by->outputs + token * by->out_apart + i;
            __m512 even = _mm512_loadu_ps(y), odd = _mm512_setzero_ps();
            if (by->constant)
#pragma GCC unroll 4
                for (int k = 0; k < LINES; k += 2) {
                    even = _mm512_fmadd_ps(level[k], _mm512_set1_ps(x[by->at[k]]), even);
                    odd = _mm512_fmadd_ps(level[k + 1], _mm512_set1_ps(x[by->at[k + 1]]), odd);
                }
            else {
                const float *from = x + by->at[LINES - 1] + i;
                const __m512i here = _mm512_loadu_si512(from), next = _mm512_loadu_si512(from + 16);
                even = _mm512_fmadd_ps(level[0], INPUT(0), even);
                odd = _mm512_fmadd_ps(level[1], INPUT(1), odd);
                even = _mm512_fmadd_ps(level[2], INPUT(2), even);
                odd = _mm512_fmadd_ps(level[3], INPUT(3), odd);
                even = _mm512_fmadd_ps(level[4], INPUT(4), even);
                odd = _mm512_fmadd_ps(level[5], INPUT(5), odd);
                even = _mm512_fmadd_ps(level[6], INPUT(6), even);
                odd = _mm512_fmadd_ps(level[7], _mm512_castsi512_ps(here), odd);
            }
            _mm512_mask_storeu_ps(y, lanes, _mm512_add_ps(even, odd));
        }
    }
}

static void add_line(const Product *by, int k) {
    for (int64_t i = by->first[k]; i < by->last[k]; i++) {
        const uint8_t number = by->levels[k * by->levels_apart + i];
        const float magnitude = by->magnitudes[number & 7], level = number & NEGATIVE ? -magnitude : magnitude;
        for (int64_t token = 0; token < by->tokens; token++)
            by->outputs[token * by->out_apart + i] +=
                level * by->inputs[token * by->in_apart + by->at[k] + (by->constant ? 0 : i)];
    }
}

/* Add what the lines make up, and forget them. */
static void add_all(Product *by, int wide) {
    if (by->lines == LINES) {
        int64_t first = by->first[0], last = by->last[0];
        for (int k = 1; k < LINES; k++) {
            if (by->first[k] < first) first = by->first[k];
            if (by->last[k] > last) last = by->last[k];
        }
        (wide ? add_lines_wide : add_lines)(by, first, last);
    } else
        for (int k = 0; k < by->lines; k++) add_line(by, k);
    by->lines = 0;
}

/* The levels of a tile at the end of the stream, behind which nothing is read. */
static void read_last_levels(const Product *by, const uint8_t *stream, int64_t nbytes, int64_t bit, int64_t length,
                             uint8_t *levels) {
    uint8_t copied[8 + TILE_BYTES] = {0};
    const int64_t from = (bit >> 3) - 8;
    for (int64_t i = from < 0 ? 0 : from; i < nbytes && i < from + (int64_t)sizeof copied; i++)
        copied[i - from] = stream[i];
    read_levels(by, copied, bit - 8 * from, length, levels);
}
#endif

EXPORT int bivlm_can_multiply(void) {
#ifdef X86
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

/* outputs[tokens][out_apart], zeros before, of the products of some parts: of bands, each from row `begins[i]` to
   `begins[i + 1]`, or of groups of antidiagonals, likewise; `bit` is where the first of them begins.

   inputs[tokens][in_apart] are the columns, backwards for antidiagonals, between 32 zeros; behind the outputs there is
   room for 16 rows. Without `widest` AVX-512 is left out. Returns 1 without memory; only where `bivlm_can_multiply`. */
EXPORT int bivlm_trellis_product(const uint8_t *stream, int64_t nbytes, int64_t bit, int64_t quarters,
                                 const uint8_t *nibbles, const uint8_t *of_place, const float *magnitudes, int64_t rows,
                                 int64_t columns, int64_t sides, const int64_t *begins, int64_t parts, const float *inputs,
                                 float *outputs, int64_t tokens, int64_t in_apart, int64_t out_apart,
                                 int64_t widest) {
#ifdef X86
    const int wide = widest && __builtin_cpu_supports("avx512vbmi"), bands = sides == 1;
    Product by = {.magnitudes = magnitudes, .inputs = inputs, .outputs = outputs, .tokens = tokens,
                  .in_apart = in_apart, .out_apart = out_apart, .constant = bands,
                  .levels_apart = rows + LONGEST + 128};
    by.levels = calloc(LINES, (size_t)by.levels_apart);
    if (!by.levels) return 1;
    product_tables(&by, (int)quarters, nibbles, of_place);
    for (int64_t part = 0; part < parts; part++) {
        const int64_t begin = begins[part], end = begins[part + 1], high = end - begin;
        Line line = bands ? (Line){0, begin, high} : diagonal(begin, rows, columns);
        int64_t size = bands ? columns * high : 0, tiles, unit = 1;
        for (int64_t d = begin; !bands && d < end; d++) size += diagonal(d, rows, columns).left;
        if (bands) { /* tiles of whole columns */
            unit = high;
            tiles = high >= FEWEST_ROWS ? columns : (columns + LONGEST / high - 1) / (LONGEST / high);
        } else
            tiles = (size + LONGEST - 1) / LONGEST;
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t length = (size / unit / tiles + (tile < size / unit % tiles)) * unit;
            uint8_t apart[LONGEST + 128], *at = by.levels + by.lines * by.levels_apart + line.row;
            uint8_t *levels = line.left < length ? apart : at;
            if ((bit >> 3) + TILE_BYTES > nbytes || bit < 64)
                read_last_levels(&by, stream, nbytes, bit, length, levels);
            else
                (wide ? read_levels_wide : read_levels)(&by, stream, bit, length, levels);
            for (int64_t ahead = 0; ahead < length * quarters / 32; ahead += 64)
                _mm_prefetch((const char *)stream + (bit >> 3) + AHEAD + ahead, _MM_HINT_T0);
            bit += (length * quarters + 3) / 4;
            for (int64_t taken = 0, some; taken < length; taken += some) {
                some = line.left < length - taken ? line.left : length - taken;
                if (levels == apart)
                    memcpy(by.levels + by.lines * by.levels_apart + line.row, levels + taken, (size_t)some);
                line.row += some, line.left -= some;
                if (line.left) continue;
                by.first[by.lines] = bands ? begin : diagonal(line.number, rows, columns).row;
                by.last[by.lines] = line.row;
                by.at[by.lines++] = BESIDE + (bands ? line.number : columns - 1 - line.number);
                line = bands ? (Line){line.number + 1, begin, high} : diagonal(line.number + 1, rows, columns);
                if (by.lines == LINES || (bands && line.number == columns)) add_all(&by, wide);
            }
        }
    }
    add_all(&by, wide);
    free(by.levels);
    return 0;
#else
    (void)stream, (void)nbytes, (void)bit, (void)quarters, (void)nibbles, (void)of_place, (void)magnitudes, (void)rows;
    (void)columns, (void)sides, (void)begins, (void)parts, (void)inputs, (void)outputs, (void)tokens, (void)in_apart, (void)out_apart, (void)widest;
    return 1;
#endif
}
