/* Products with a weight whose symbols lie in planes (`bivlm.packing.radix`), straight from them.

   A word's symbols are made one after another, those of as many words at once as a vector has lanes; the inputs lie in
   that order. A symbol stands for an entry of its row's table or, in coded weights, for its number, of which a group
   has a scale and a zero point: sums of numbers and inputs are scaled block by block. Rows and tokens are taken some at
   a time, so that inputs are read for several rows and symbols made for several tokens. Each sum has one order,
   whatever the number of tokens, rows and threads. */

#include "native.h"

/* Bits of a symbol; or words are numbers of some base, whose digits are symbols. */
enum { ONE = 1, TWO = 2, THREE = 3, FOUR = 4, EIGHT = 8, BASE_6 = 16, BASE_10 = 20, BASE_12 = 22, BASE_14 = 24 };
enum { MOST = 4, SALIENT_TOKENS = 8 };
enum { FOURS = 4, PANEL = 512 }; /* many tokens take as many times four rows, and columns of levels, together */
enum { CACHE_LINE = 64 };
enum { AHEAD = 8192 }; /* bytes of a row that memory is asked for before they are read */

#define BASE(kind) ((kind) - 10)
#define RECIPROCAL(kind) ((65536 + BASE(kind) - 1) / BASE(kind))
/* Digits of a word, or the symbols in as many bits as a lane holds. */
#define STEPS(kind) \
    ((kind) == BASE_14 ? 2 : (kind) >= BASE_10 ? 3 : (kind) == BASE_6 ? 5 : (kind) == THREE ? 16 : 32 / (kind))
/* Of a word's digits eight bits lie in the first plane, and as many in the others. */
#define PLANE_BITS(kind, plane) \
    ((plane) == 1 ? (kind) == BASE_6 ? 4 : (kind) == BASE_14 ? 0 : 2 : (kind) == BASE_6 || (kind) == BASE_12)

/* A product, which `bivlm.packing.plane_product` fills in. */
typedef struct {
    int64_t kind, lanes, tokens, blocks; /* lanes are those of the vectors that the inputs' order is for */
    const uint8_t *planes[3];
    int64_t readable[3], row_bytes[3]; /* from the beginning of each plane on, and of a row */
    const float *inputs;               /* [tokens][blocks][steps][lanes] */
    const float *table, *by_row;       /* [16], and what is added to it, times the row's scale; or NULL */
    const uint8_t *row_scales;         /* float16 [rows], or NULL */
    const uint8_t *scales, *zeros;     /* of coded weights, float16 and uint8 [rows][groups]; else NULL */
    int64_t groups;
    const float *sums;                  /* of the inputs of a word, [tokens][blocks][lanes] */
    const int32_t *first_group, *group; /* of each block, and of its words from there on, [blocks][lanes] */
    int64_t levels;                     /* of salient weights */
    const uint32_t *begins;             /* of columns, [rows][levels] and one more; or NULL */
    const uint16_t *columns;
    const float *centres;               /* [levels], times the row's scale */
    const uint8_t *marks;               /* [levels], the symbols at their places */
    const float *plain;                 /* inputs, [columns][plain_apart] */
    int64_t plain_apart;
    float *outputs; /* [tokens][out_apart] */
    int64_t out_apart;
    /* Or inputs of a byte, those of every fourth column of a word together; then of their words `input_scales`, and
       `sums` of what they stand for. Levels that are not coded are `lowest_level` and multiples of `level_unit`, which
       `level_bytes` [16] are below 128. */
    const int8_t *bytes; /* [tokens][blocks][steps / 4][lanes][4], or NULL */
    const float *input_scales, *token_sums;
    const uint8_t *level_bytes;
    float level_unit, lowest_level;
} PlaneProduct;

/* Of some rows: where their planes, their tables (16 levels), scales, and scales times negative zero points are. */
typedef struct {
    const uint8_t *planes[3][MOST];
    const float *tables[MOST], *scales[MOST], *offsets[MOST];
} Rows;

#ifdef X86
#define JOIN(x, y) x##_##y
#define ZERO SET(0.0f)

#define W 8
#define TILE_TOKENS 2
#define STORE _mm256_storeu_ps
#define STORE_I(at, v) _mm256_storeu_si256((__m256i *)(at), v)
#define ROWS(T) ((T) == 1 ? 4 : 2)
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(x) JOIN(x, 8)
#define V __m256
#define I __m256i
#define SET _mm256_set1_ps
#define LOAD _mm256_loadu_ps
#define FMA _mm256_fmadd_ps
#define MULTIPLY _mm256_mul_ps
#define PERMUTE _mm256_permutevar8x32_ps
#define FLOATS _mm256_cvtepi32_ps
#define SET_I _mm256_set1_epi32
#define LOAD_I(at) _mm256_loadu_si256((const __m256i *)(at))
#define BYTES(at) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at)))
#define SHORTS(at) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(at)))
#define SHIFT_RIGHT _mm256_srli_epi32
#define SHIFT_LEFT _mm256_slli_epi32
#define FIELDS(bits, at) fields_8(bits, at)
#define AND _mm256_and_si256
#define OR _mm256_or_si256
#define CHOOSE(mask, yes, no) _mm256_or_si256(_mm256_and_si256(mask, yes), _mm256_andnot_si256(mask, no))
#define SUBTRACT _mm256_sub_epi32
#define HIGH_PRODUCT _mm256_mulhi_epu16
#define LOW_PRODUCT _mm256_mullo_epi16
#define LOOK_UP(sixteen, table, symbol) look_up_8(sixteen, table, symbol)
#define SUM sum_8
#define BYTE_TARGET TARGET
#define BYTE_ROWS(T) ROWS(T)
#define SIXTEEN_BYTES(at) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(at)))
#define SHUFFLE _mm256_shuffle_epi8
#define DOT(kind, sum, levels, inputs) dot_8((kind) == EIGHT, sum, levels, inputs)

/* Adds products of four bytes, those of `levels` without sign, to each lane. A sum of two has 16 bits: levels up to
   127 fit, or those of eight bits in two parts. */
TARGET static inline __attribute__((always_inline)) __m256i dot_8(const int eight, __m256i sum, __m256i levels,
                                                                   __m256i inputs) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(127);
    const __m256i parts = eight ? _mm256_and_si256(levels, low) : levels;
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(parts, inputs), ones));
    if (!eight) return sum;
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(levels, 7), _mm256_set1_epi8(1));
    const __m256i above = _mm256_madd_epi16(_mm256_maddubs_epi16(high, inputs), ones);
    return _mm256_add_epi32(sum, _mm256_slli_epi32(above, 7));
}

TARGET static inline __m256 look_up_8(const int sixteen, const __m256 *table, __m256i symbol) {
    const __m256 low = _mm256_permutevar8x32_ps(table[0], symbol);
    if (!sixteen) return low;
    const __m256 high = _mm256_permutevar8x32_ps(table[1], symbol);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(symbol, 28)));
}

static inline int32_t bytes_at(const uint8_t *at, const int count) {
    const uint32_t two = count > 1 ? at[0] | (uint32_t)at[1] << 8 : at[0];
    return (int32_t)(count > 2 ? two | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24 : two);
}

/* Eight fields of some bits, each in a lane, with bits above it. */
TARGET static inline __attribute__((always_inline)) __m256i fields_8(const int bits, const uint8_t *at) {
    const __m256i places = _mm256_mullo_epi16(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    return _mm256_srlv_epi32(_mm256_set1_epi32(bytes_at(at, bits)), places);
}

TARGET static inline float sum_8(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#include "plane_lanes.h"
#undef W
#undef TILE_TOKENS
#undef STORE
#undef STORE_I
#undef ROWS
#undef TARGET
#undef NAME
#undef V
#undef I
#undef SET
#undef LOAD
#undef FMA
#undef PERMUTE
#undef FLOATS
#undef SET_I
#undef LOAD_I
#undef BYTES
#undef SHORTS
#undef SHIFT_RIGHT
#undef SHIFT_LEFT
#undef FIELDS
#undef AND
#undef OR
#undef CHOOSE
#undef SUBTRACT
#undef HIGH_PRODUCT
#undef LOW_PRODUCT
#undef LOOK_UP
#undef SUM
#undef MULTIPLY
#undef BYTE_TARGET
#undef BYTE_ROWS
#undef SIXTEEN_BYTES
#undef SHUFFLE
#undef DOT

#define W 16
#define TILE_TOKENS 4
#define STORE _mm512_storeu_ps
#define STORE_I(at, v) _mm512_storeu_si512(at, v)
#define ROWS(T) 4
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw")))
#define NAME(x) JOIN(x, 16)
#define V __m512
#define I __m512i
#define SET _mm512_set1_ps
#define LOAD _mm512_loadu_ps
#define FMA _mm512_fmadd_ps
#define PERMUTE(v, at) _mm512_permutexvar_ps(at, v)
#define FLOATS _mm512_cvtepi32_ps
#define SET_I _mm512_set1_epi32
#define LOAD_I(at) _mm512_loadu_si512(at)
#define BYTES(at) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(at)))
#define SHORTS(at) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(at)))
#define SHIFT_RIGHT _mm512_srli_epi32
#define SHIFT_LEFT _mm512_slli_epi32
#define FIELDS(bits, at) fields_16(bits, at)
#define AND _mm512_and_si512
#define OR _mm512_or_si512
#define CHOOSE(mask, yes, no) _mm512_ternarylogic_epi32(mask, yes, no, 0xCA)
#define SUBTRACT _mm512_sub_epi32
#define HIGH_PRODUCT _mm512_mulhi_epu16
#define LOW_PRODUCT _mm512_mullo_epi16
#define LOOK_UP(sixteen, table, symbol) _mm512_permutexvar_ps(symbol, (table)[0])
#define SUM _mm512_reduce_add_ps
#define MULTIPLY _mm512_mul_ps
#define BYTE_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vnni")))
#define BYTE_ROWS(T) 4
#define SIXTEEN_BYTES(at) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(at)))
#define SHUFFLE _mm512_shuffle_epi8
#define DOT(kind, sum, levels, inputs) _mm512_dpbusd_epi32(sum, levels, inputs)

TARGET static inline __attribute__((always_inline)) __m512i fields_16(const int bits, const uint8_t *at) {
    if (bits == 4) return _mm512_inserti64x4(_mm512_castsi256_si512(fields_8(4, at)), fields_8(4, at + 4), 1);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_srlv_epi32(_mm512_set1_epi32(bytes_at(at, 2 * bits)), bits == 2 ? _mm512_add_epi32(lanes, lanes) : lanes);
}

#include "plane_lanes.h"

/* A float16 of an array whose address may be odd. */
__attribute__((target("f16c"))) static inline float half_at(const uint8_t *halves, int64_t number) {
    uint16_t half;
    memcpy(&half, halves + 2 * number, sizeof half);
    return _cvtsh_ss(half);
}

/* Scales, and scales times negative zero points, of a row's groups. */
__attribute__((target("f16c"))) static void read_groups(const uint8_t *halves, const uint8_t *zeros, int64_t groups,
                                                         float *scales, float *offsets) {
    for (int64_t group = 0; group < groups; group++) {
        scales[group] = half_at(halves, group);
        offsets[group] = -scales[group] * zeros[group];
    }
}

/* Where a row of a plane lies: in a copy, where reading whole vectors would leave the plane. */
static const uint8_t *row_of(const uint8_t *plane, int64_t readable, int64_t row_bytes, int64_t row, int64_t taken,
                             uint8_t *copy) {
    if (row * row_bytes + taken <= readable) return plane + row * row_bytes;
    memcpy(copy, plane + row * row_bytes, (size_t)row_bytes);
    return copy;
}

/* Where a row's planes and its levels or scales are, as the r-th of four. */
__attribute__((target("f16c"))) static void read_row(const PlaneProduct *by, int64_t number, const int64_t *taken,
                                                      uint8_t *copy, float *table, float *scales, float *offsets,
                                                      Rows *rows, int r) {
    for (int plane = 0; plane < 3; copy += taken[plane++])
        rows->planes[plane][r] =
            row_of(by->planes[plane], by->readable[plane], by->row_bytes[plane], number, taken[plane], copy);
    const float scale = by->by_row ? half_at(by->row_scales, number) : 0.0f;
    for (int k = 0; k < 16; k++) table[k] = by->table[k] + (by->by_row ? scale * by->by_row[k] : 0.0f);
    rows->tables[r] = table, rows->scales[r] = scales, rows->offsets[r] = offsets;
    if (by->scales)
        read_groups(by->scales + 2 * number * by->groups, by->zeros + number * by->groups, by->groups, scales, offsets);
}

/* What salient weights add to a row: of each level the columns' inputs are added up. */
__attribute__((target("f16c"))) static void add_salient(const PlaneProduct *by, int64_t row) {
    const float row_scale = half_at(by->row_scales, row);
    const uint32_t *begins = by->begins + row * by->levels;
    float *y = by->outputs + row;
    for (int64_t level = 0; level < by->levels; level++) {
        const uint16_t *at = by->columns + begins[level], *end = by->columns + begins[level + 1];
        const float difference = row_scale * by->centres[level] - by->table[by->marks[level]];
        if (by->plain_apart == 1) {
            float sum[4] = {0, 0, 0, 0};
            for (; end - at >= 4; at += 4)
                for (int k = 0; k < 4; k++) sum[k] += by->plain[at[k]];
            for (; at < end; at++) sum[0] += by->plain[*at];
            y[0] += difference * ((sum[0] + sum[1]) + (sum[2] + sum[3]));
            continue;
        }
        for (int64_t token = 0; token < by->tokens; token += SALIENT_TOKENS) {
            float sum[SALIENT_TOKENS] = {0};
            for (const uint16_t *each = at; each < end; each++)
                for (int k = 0; k < SALIENT_TOKENS; k++) sum[k] += by->plain[*each * by->plain_apart + token + k];
            for (int k = 0; k < SALIENT_TOKENS && token + k < by->tokens; k++)
                y[(token + k) * by->out_apart] += difference * sum[k];
        }
    }
}

/* Four rows of the tokens from one on, one or two at a time. */
static void times_few(const PlaneProduct *by, const Rows *rows, int64_t row, int64_t some, int64_t token) {
    for (int64_t taken; token < by->tokens; token += taken) {
        float y[MOST * 2];
        taken = by->tokens - token >= 2 ? 2 : 1;
        if (by->bytes && by->lanes == 16)
            (taken == 2 ? byte_times_2_16 : byte_times_1_16)(by, rows, token, y);
        else if (by->bytes)
            (taken == 2 ? byte_times_2_8 : byte_times_1_8)(by, rows, token, y);
        else if (by->lanes == 16)
            (taken == 2 ? times_2_16 : times_1_16)(by, rows, token, y);
        else
            (taken == 2 ? times_2_8 : times_1_8)(by, rows, token, y);
        for (int64_t r = 0; r < some; r++)
            for (int64_t t = 0; t < taken; t++) by->outputs[(token + t) * by->out_apart + row + r] = y[r * taken + t];
    }
}
#endif

/* How many floats a vector has, with inputs of a byte or of 32 bits: their order depends on it. 0 where products are
   not there. */
EXPORT int bivlm_plane_lanes(int bytes) {
#ifdef X86
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
    return __builtin_cpu_supports("avx512bw") && (!bytes || __builtin_cpu_supports("avx512vnni")) ? 16 : 8;
#else
    (void)bytes;
    return 0;
#endif
}

/* Inputs [tokens][columns] as words are read, rounded to a byte: [tokens][blocks][steps / 4][lanes][4], those of every
   fourth column together; a scale for each word, and the sum of what its bytes stand for, [tokens][blocks][lanes]. The
   scale of a word with an input that is no number, or infinite, is no number. */
EXPORT void bivlm_order_bytes(const float *inputs, int64_t tokens, int64_t columns, int64_t steps, int64_t lanes,
                              int64_t blocks, int8_t *ordered, float *scales, float *sums) {
#ifdef X86
    for (int64_t word = 0; word < tokens * blocks * lanes; word++, scales++, sums++) {
        const int64_t token = word / (blocks * lanes), begin = word % (blocks * lanes) * steps;
        const int64_t left = columns - begin, count = left < 0 ? 0 : left < steps ? left : steps;
        const float *x = inputs + token * columns + begin;
        int8_t *to = ordered + word / lanes * lanes * steps + word % lanes * 4;
        float largest = 0.0f, none = 0.0f;
        for (int64_t k = 0; k < count; k++) {
            const float size = x[k] < 0.0f ? -x[k] : x[k];
            largest = size > largest ? size : largest, none += x[k] - x[k];
        }
        const float scale = largest / 127.0f, up = scale > 1e-37f ? 1.0f / scale : 0.0f;
        int sum = 0;
        for (int64_t byte = 0, k = 0; byte < 4; byte++)
            for (int64_t step = 0; step < steps / 4; step++, k++) {
                const int8_t number = k < count ? (int8_t)_mm_cvtss_si32(_mm_set_ss(x[k] * up)) : 0;
                to[step * 4 * lanes + byte] = number;
                sum += number;
            }
        *scales = scale + none, *sums = *scales * (float)sum;
    }
#else
    (void)inputs, (void)tokens, (void)columns, (void)steps, (void)lanes, (void)blocks, (void)ordered, (void)scales, (void)sums;
#endif
}

/* The outputs from row `first` to `last`. Returns 1 without memory; only where there are lanes. */
EXPORT int bivlm_plane_product(const PlaneProduct *by, int64_t first, int64_t last) {
#ifdef X86
    int64_t taken[3], all_taken = 0; /* what blocks take of a row of each plane */
    for (int plane = 0; plane < 3; plane++) {
        const int bits = by->kind > EIGHT ? plane ? PLANE_BITS(by->kind, plane) : 8
                         : plane          ? plane == 1 && by->kind == THREE ? 16 : 0
                                          : 32;
        all_taken += taken[plane] = by->blocks * by->lanes * bits / 8;
    }
    const int64_t many = by->tokens < 4 ? 0 : by->tokens & ~INT64_C(3); /* of tokens, in tiles */
    const int64_t fours = many ? FOURS : 1, groups_apart = by->groups + 16;
    float *numbers = calloc((size_t)(2 * fours * MOST * groups_apart), sizeof(float));
    uint8_t *copies = calloc((size_t)(fours * MOST), (size_t)all_taken);
    float *room = malloc((size_t)(fours * MOST * (PANEL + many * by->lanes)) * sizeof(float) + CACHE_LINE);
    float *levels = (float *)(((uintptr_t)room + CACHE_LINE - 1) & ~(uintptr_t)(CACHE_LINE - 1));
    int failed = !numbers || !copies || !room;
    for (int64_t row = first; row < last && !failed; row += fours * MOST) {
        Rows rows[FOURS];
        float tables[FOURS * MOST][16];
        const int64_t some = last - row < fours * MOST ? last - row : fours * MOST;
        const int some_fours = (int)((some + MOST - 1) / MOST);
        for (int r = 0; r < some_fours * MOST; r++) {
            const int64_t number = r < some ? row + r : row;
            float *scales = numbers + 2 * r * groups_apart;
            read_row(by, number, taken, copies + r * all_taken, tables[r], scales, scales + groups_apart, rows + r / MOST,
                     r % MOST);
        }
        if (many)
            (by->lanes == 16 ? times_many_16 : times_many_8)(by, rows, some_fours, row, last, many, levels,
                                                            levels + fours * MOST * PANEL);
        for (int64_t r = 0; r < some; r += MOST)
            times_few(by, rows + r / MOST, row + r, some - r < MOST ? some - r : MOST, many);
        for (int64_t number = row; by->begins && number < row + some; number++) add_salient(by, number);
    }
    free(numbers), free(copies), free(room);
    return failed;
#else
    (void)by, (void)first, (void)last;
    return 1;
#endif
}
