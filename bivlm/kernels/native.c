/* Native code of bivlm: plain C, called through ctypes; the same bytes come out of the numpy path beside it.

   Sums run in a fixed order and products are not fused into them (-ffp-contract=off), so that every compiler, thread
   count and instruction set gives the same floats. Build flags are in pyproject.toml. */

#include "native.h"

/* Raised when a function changes: the Python side takes a library of its own number alone. */
enum { INTERFACE = 6 };
enum { LEVELS = 16 };
#define SATURATED 65535u

EXPORT int64_t bivlm_interface(void) { return INTERFACE; }

static int with_avx2(void) {
#ifdef X86
    return __builtin_cpu_supports("avx2");
#else
    return 0;
#endif
}

/* Search of the bit-shift trellis, see bivlm/numerics/trellis.py, which says what is computed.

   A path's cost is a uint16 whose lowest `keep` bits are free: in them the minimum over predecessors carries which of
   them it was. */

typedef struct {
    int state_bits, keep;
    const uint8_t *code;      /* [2][2^L]: level of a state after a step with bits, and after one without */
    const uint8_t *shuffled;  /* the same, in the order in which AVX2 code takes it; NULL without */
    uint16_t *cost, *least;   /* [2^L] each */
    uint8_t *came_from;       /* [steps][2^(L-1)] */
} Search;

static inline unsigned plus(unsigned a, unsigned b) {
    unsigned sum = a + b;
    return sum > SATURATED ? SATURATED : sum;
}

static void least_plain(const Search *s, int bits, uint8_t *from) {
    const unsigned groups = 1u << (s->state_bits - bits);
    const uint16_t keep = (uint16_t)~((1u << s->keep) - 1);
    unsigned lowest = SATURATED;
    for (unsigned g = 0; g < groups; g++) {
        unsigned best = s->cost[g] & keep;
        for (unsigned j = 1; j < 1u << bits; j++) {
            unsigned other = (s->cost[j * groups + g] & keep) | j;
            if (other < best) best = other;
        }
        from[g] = (uint8_t)(best & ~keep);
        s->least[g] = (uint16_t)(best & keep);
        if (s->least[g] < lowest) lowest = s->least[g];
    }
    for (unsigned g = 0; g < groups; g++) s->least[g] = (uint16_t)(s->least[g] - lowest);
}

static void add_plain(const Search *s, int bits, const uint16_t *level_cost) {
    const unsigned states = 1u << s->state_bits;
    const uint8_t *code = s->code + (bits ? 0 : states);
    for (unsigned i = 0; i < states; i++) s->cost[i] = (uint16_t)plus(s->least[i >> bits], level_cost[code[i]]);
}

#ifdef X86
AVX2 static void least_avx2(const Search *s, int bits, uint8_t *from) {
    const unsigned groups = 1u << (s->state_bits - bits);
    const __m256i kept = _mm256_set1_epi16((short)~((1u << s->keep) - 1));
    __m256i lowest = _mm256_set1_epi16(-1);
    for (unsigned g = 0; g < groups; g += 32) {
        __m256i both[2];
        for (int half = 0; half < 2; half++) {
            const uint16_t *at = s->cost + g + 16 * half;
            __m256i best = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)at), kept);
            for (unsigned j = 1; j < 1u << bits; j++) {
                __m256i other = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(at + j * groups)), kept);
                best = _mm256_min_epu16(best, _mm256_or_si256(other, _mm256_set1_epi16((short)j)));
            }
            both[half] = _mm256_andnot_si256(kept, best);
            best = _mm256_and_si256(best, kept);
            lowest = _mm256_min_epu16(lowest, best);
            _mm256_storeu_si256((__m256i *)(s->least + g + 16 * half), best);
        }
        __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(both[0], both[1]), 0xD8);
        _mm256_storeu_si256((__m256i *)(from + g), bytes);
    }
    __m128i least = _mm_minpos_epu16(
        _mm_min_epu16(_mm256_castsi256_si128(lowest), _mm256_extracti128_si256(lowest, 1)));
    const __m256i by = _mm256_set1_epi16((short)_mm_extract_epi16(least, 0));
    for (unsigned g = 0; g < groups; g += 16) {
        __m256i *at = (__m256i *)(s->least + g);
        _mm256_storeu_si256(at, _mm256_sub_epi16(_mm256_loadu_si256(at), by));
    }
}

/* The path costs of 16 / 2^bits groups, each as often as it has states. */
AVX2 static inline __m256i spread(const uint16_t *least, int bits) {
    if (bits == 0) return _mm256_loadu_si256((const __m256i *)least);
    if (bits == 1) {
        __m256i eight = _mm256_permute4x64_epi64(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)least)), 0x50);
        return _mm256_shuffle_epi8(eight, _mm256_setr_epi8(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 0, 1, 0, 1,
                                                           2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7));
    }
    if (bits == 2) {
        int64_t four;
        memcpy(&four, least, 8);
        return _mm256_shuffle_epi8(_mm256_set1_epi64x(four),
                                   _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5, 4,
                                                    5, 6, 7, 6, 7, 6, 7, 6, 7));
    }
    int32_t two;
    memcpy(&two, least, 4);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(two),
                               _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3,
                                                2, 3, 2, 3, 2, 3, 2, 3));
}

AVX2 static inline void add_some(const Search *s, int bits, const uint16_t *level_cost) {
    const unsigned states = 1u << s->state_bits;
    const uint8_t *code = s->shuffled + (bits ? 0 : states);
    uint8_t low[LEVELS], high[LEVELS];
    for (int i = 0; i < LEVELS; i++) {
        low[i] = (uint8_t)level_cost[i];
        high[i] = (uint8_t)(level_cost[i] >> 8);
    }
    const __m256i lows = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low));
    const __m256i highs = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high));
    for (unsigned i = 0; i < states; i += 32) {
        const __m256i index = _mm256_loadu_si256((const __m256i *)(code + i));
        const __m256i a = _mm256_shuffle_epi8(lows, index), b = _mm256_shuffle_epi8(highs, index);
        const __m256i first = spread(s->least + (i >> bits), bits);
        const __m256i second = spread(s->least + ((i + 16) >> bits), bits);
        __m256i *at = (__m256i *)(s->cost + i);
        _mm256_storeu_si256(at, _mm256_adds_epu16(first, _mm256_unpacklo_epi8(a, b)));
        _mm256_storeu_si256(at + 1, _mm256_adds_epu16(second, _mm256_unpackhi_epi8(a, b)));
    }
}

AVX2 static void add_avx2(const Search *s, int bits, const uint16_t *level_cost) {
    switch (bits) { /* constants, so that each gets a loop of its own */
        case 0: add_some(s, 0, level_cost); break;
        case 1: add_some(s, 1, level_cost); break;
        case 2: add_some(s, 2, level_cost); break;
        default: add_some(s, 3, level_cost); break;
    }
}

/* AVX2 interleaves within halves of 16 bytes: states 8 to 15 and 16 to 23 change places. */
static void shuffle_code(const uint8_t *code, uint8_t *shuffled, unsigned states) {
    for (unsigned i = 0; i < states; i++) {
        unsigned part = (i >> 3) & 3, to = part == 1 ? i + 8 : part == 2 ? i - 8 : i;
        shuffled[to] = code[i];
    }
}
#endif

static void step(const Search *s, int bits, const uint16_t *level_cost, uint8_t *from) {
#ifdef X86
    if (s->shuffled) {
        if (bits)
            least_avx2(s, bits, from);
        else
            memcpy(s->least, s->cost, sizeof(uint16_t) << s->state_bits);
        add_avx2(s, bits, level_cost);
        return;
    }
#endif
    if (bits)
        least_plain(s, bits, from);
    else
        memcpy(s->least, s->cost, sizeof(uint16_t) << s->state_bits);
    add_plain(s, bits, level_cost);
}

static void level_costs(float x, const float *levels, float reach, float unit, float weight, uint16_t *cost) {
    x = x > reach ? reach : x < -reach ? -reach : x; /* NaN does not come here */
    for (int i = 0; i < LEVELS; i++) {
        float apart = x - levels[i];
        float scaled = apart * apart * unit * weight + 0.5f;
        cost[i] = scaled >= 65535.0f ? 65535u : (uint16_t)scaled;
    }
}

static unsigned best_state(const Search *s, unsigned first, unsigned every) {
    const unsigned states = 1u << s->state_bits;
    unsigned best = first;
    for (unsigned i = first; i < states; i += every)
        if (s->cost[i] < s->cost[best]) best = i;
    return best;
}

static unsigned before(const Search *s, int bits, unsigned state, const uint8_t *from) {
    if (!bits) return state;
    return ((unsigned)from[state >> bits] << (s->state_bits - bits)) | (state >> bits);
}

/* Find the bits of `tiles` sequences of `length` numbers (unit variance), one after another in x, with as many weights
   of their squared errors, or NULL.

   steps[length] are the bits of each step, of which the first has some; `around` is how many steps either side of the
   seam choose the state there. symbols[tiles][length] are the new bits of each step, indices[tiles][length] the levels
   that they stand for. Returns 0, or 1 without memory. */
EXPORT int bivlm_trellis_search(const float *x, const float *weights, int64_t tiles, int64_t length,
                                const uint8_t *steps, int64_t state_bits, const uint8_t *code, const float *levels,
                                float reach, float unit, int64_t around, uint8_t *symbols, uint8_t *indices) {
    const unsigned states = 1u << state_bits, half = states / 2;
    int keep = 1, failed = 0;
    for (int64_t t = 0; t < length; t++)
        if (steps[t] > keep) keep = steps[t];
    Search s = {(int)state_bits, keep, code, NULL, NULL, NULL, NULL};
    s.cost = malloc(sizeof(uint16_t) * states);
    s.least = malloc(sizeof(uint16_t) * states);
    s.came_from = malloc((size_t)half * (size_t)length);
    uint8_t *shuffled = malloc(2 * (size_t)states);
    uint16_t *costs = malloc(sizeof(uint16_t) * LEVELS * (size_t)length);
    if (!s.cost || !s.least || !s.came_from || !shuffled || !costs) failed = 1;
#ifdef X86
    if (!failed && with_avx2() && state_bits >= 8) {
        shuffle_code(code, shuffled, states);
        shuffle_code(code + states, shuffled + states, states);
        s.shuffled = shuffled;
    }
#endif
    for (int64_t tile = 0; tile < tiles && !failed; tile++) {
        const float *values = x + tile * length;
        uint8_t *found = symbols + tile * length;
        for (int64_t t = 0; t < length; t++)
            level_costs(values[t], levels, reach, unit, weights ? weights[tile * length + t] : 1.0f,
                        costs + t * LEVELS);
        unsigned every = 1, shared = 0;
        if (length >= SHORTEST) {
            /* The state at the seam: a free path through the end of the tile and on into its beginning. */
            memset(s.cost, 0, sizeof(uint16_t) * states);
            for (int64_t t = length - around; t < length + around; t++) {
                int64_t at = t % length;
                step(&s, steps[at], costs + at * LEVELS, s.came_from + (size_t)half * (size_t)(t - length + around));
            }
            unsigned seam = best_state(&s, 0, 1);
            for (int64_t t = length + around - 1; t >= length; t--)
                seam = before(&s, steps[t % length], seam, s.came_from + (size_t)half * (size_t)(t - length + around));
            /* The best path that begins and ends there: of that state the first step drops the oldest bits. */
            every = states >> steps[0];
            shared = seam & (every - 1);
        }
        memset(s.cost, 0xff, sizeof(uint16_t) * states);
        for (unsigned i = shared; i < states; i += length >= SHORTEST ? every : states) s.cost[i] = 0;
        for (int64_t t = 0; t < length; t++)
            step(&s, steps[t], costs + t * LEVELS, s.came_from + (size_t)half * (size_t)t);
        unsigned state = best_state(&s, shared, every);
        for (int64_t t = length - 1; t >= 0; t--) {
            found[t] = (uint8_t)(state & ((1u << steps[t]) - 1));
            state = before(&s, steps[t], state, s.came_from + (size_t)half * (size_t)t);
        }
        /* The bits alone say which states are gone through. */
        state = 0;
        int64_t first = length;
        for (int taken = 0; length >= SHORTEST && taken < state_bits; taken += steps[first]) first--;
        for (int64_t t = first; t < length; t++) state = ((state << steps[t]) | found[t]) & (states - 1);
        for (int64_t t = 0; t < length; t++) {
            state = ((state << steps[t]) | found[t]) & (states - 1);
            indices[tile * length + t] = code[(steps[t] ? 0 : states) + state];
        }
    }
    free(s.cost), free(s.least), free(s.came_from), free(shuffled), free(costs);
    return failed;
}

/* Error feedback: rest[n][t] -= sum over b of shares[b][n] * errors[b][t], b in rising order; rows lie apart. */
WIDEST static void feed_rows(float *restrict rest, int64_t rest_apart, const float *restrict shares,
                             int64_t shares_apart, const float *restrict errors, int64_t errors_apart, int64_t count,
                             int64_t block, int64_t length) {
    enum { TOGETHER = 64 };
    for (int64_t n = 0; n < count; n++) {
        int64_t t = 0;
        for (; t + TOGETHER <= length; t += TOGETHER) {
            float sum[TOGETHER];
            float *row = rest + n * rest_apart + t;
            for (int i = 0; i < TOGETHER; i++) sum[i] = row[i];
            for (int64_t b = 0; b < block; b++) {
                const float share = shares[b * shares_apart + n], *error = errors + b * errors_apart + t;
                for (int i = 0; i < TOGETHER; i++) sum[i] -= share * error[i];
            }
            for (int i = 0; i < TOGETHER; i++) row[i] = sum[i];
        }
        for (; t < length; t++) {
            float sum = rest[n * rest_apart + t];
            for (int64_t b = 0; b < block; b++) sum -= shares[b * shares_apart + n] * errors[b * errors_apart + t];
            rest[n * rest_apart + t] = sum;
        }
    }
}

EXPORT void bivlm_feed_rows(float *rest, int64_t rest_apart, const float *shares, int64_t shares_apart,
                            const float *errors, int64_t errors_apart, int64_t count, int64_t block, int64_t length) {
    feed_rows(rest, rest_apart, shares, shares_apart, errors, errors_apart, count, block, length);
}

/* Read tiles: levels[sum of lengths], the level of every number. Eight bytes behind the stream's end are read. */
EXPORT void bivlm_trellis_read(const uint8_t *stream, const int64_t *begins, const int64_t *lengths, int64_t tiles,
                               const uint8_t *pattern, int64_t state_bits, const uint8_t *code, uint8_t *levels) {
    enum { TOGETHER = 12 }; /* steps of up to 3 bits whose windows lie in one word, wherever in a byte it begins */
    const unsigned states = 1u << state_bits, mask = states - 1;
    const int down = 64 - (int)state_bits;
    int shift[TOGETHER], together = 0;
    const uint8_t *codes[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) {
        together += pattern[i & 3];
        shift[i] = down - together;
        codes[i] = code + (pattern[i & 3] ? 0 : states);
    }
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t begin = begins[tile], end = begins[tile + 1];
        int64_t bit = begin, length = lengths[tile], t = 0;
        unsigned state = length < SHORTEST ? 0 : (unsigned)(word(stream, end - state_bits) >> down);
        /* The first bits of the tile follow the last ones; from then on a window on the stream is the state. */
        for (; t < length && (bit < begin + state_bits || t & 3); t++) {
            const int bits = pattern[t & 3];
            if (bits) state = ((state << bits) | (unsigned)(word(stream, bit) >> (64 - bits))) & mask;
            bit += bits;
            levels[t] = codes[t & 3][state];
        }
        for (; t + TOGETHER <= length; t += TOGETHER, bit += together) {
            const uint64_t windows = word(stream, bit - state_bits);
            for (int i = 0; i < TOGETHER; i++) levels[t + i] = codes[i][(windows >> shift[i]) & mask];
        }
        for (; t < length; t++) {
            bit += pattern[t & 3];
            levels[t] = codes[t & 3][word(stream, bit - state_bits) >> down];
        }
        levels += length;
    }
}

/* Two-sided error feedback of some elements (i, j) of a weight [rows][columns], see trellis_feedback.py: into later
   elements of the same row or column up to `near` blocks on; what is left over is kept for those farther away. */
WIDEST static void subtract_row(float *restrict from, const float *restrict row, float factor, int64_t count) {
    for (int64_t n = 0; n < count; n++) from[n] -= factor * row[n];
}

static int64_t nearest(int64_t at, int64_t block, int64_t near, int64_t size) {
    const int64_t end = (at / block + near) * block;
    return end < size ? end : size;
}

EXPORT void bivlm_feed_both(const float *weight, const float *rebuilt, const int64_t *at_i, const int64_t *at_j,
                            float *fed, float *fed_outputs, const float *output_shares, const float *shares,
                            float *errors, float *products, int64_t count, int64_t rows, int64_t columns, int64_t block,
                            int64_t near) {
    for (int64_t n = 0; n < count; n++) {
        const int64_t i = at_i[n], j = at_j[n];
        const float before = fed[i * columns + j];
        const float error = weight[i * columns + j] + (before + fed_outputs[j * rows + i]) - rebuilt[n];
        const float product = error - before;
        errors[j * rows + i] = error;
        products[i * columns + j] = product;
        subtract_row(fed + i * columns + j + 1, shares + j * columns + j + 1, error,
                     nearest(j, block, near, columns) - j - 1);
        subtract_row(fed_outputs + j * rows + i + 1, output_shares + i * rows + i + 1, product,
                     nearest(i, block, near, rows) - i - 1);
    }
}

/* Rotations, see bivlm/numerics/hadamard.py: signs and Hadamard transforms of the first and the last `part` floats of a
   row, `part` a power of two. `second` are the signs of the last ones. */
typedef struct {
    int64_t width, part;
    float factor; /* of a transform */
    const float *first, *second;
} Rotation;

/* Steps of the transform from `half` on; two at once give the sums of one after the other. */
WIDEST static void transform_from(float *restrict x, int64_t width, int64_t half, float factor) {
    for (; half < width && half < 8; half *= 2)
        for (int64_t at = 0; at < width; at += 2 * half)
            for (int64_t i = at; i < at + half; i++) {
                const float first = x[i], second = x[i + half];
                x[i] = first + second;
                x[i + half] = first - second;
            }
    for (; 2 * half < width; half *= 4)
        for (int64_t at = 0; at < width; at += 4 * half) {
            float *restrict p = x + at, *restrict q = p + half, *restrict r = q + half, *restrict s = r + half;
            for (int64_t i = 0; i < half; i++) {
                const float a = p[i] + q[i], b = p[i] - q[i], c = r[i] + s[i], d = r[i] - s[i];
                p[i] = a + c;
                q[i] = b + d;
                r[i] = a - c;
                s[i] = b - d;
            }
        }
    for (; half < width; half *= 2) {
        float *restrict low = x, *restrict high = x + half;
        for (int64_t i = 0; i < half; i++) {
            const float first = low[i], second = high[i];
            low[i] = first + second;
            high[i] = first - second;
        }
    }
    for (int64_t i = 0; i < width; i++) x[i] *= factor;
}

#ifdef X86
/* One step within eight floats: each of `other`, plus or minus this. Sums of two do not depend on their order. */
AVX2 static inline __m256 within(__m256 x, __m256 other, __m256 sign) {
    return _mm256_add_ps(other, _mm256_xor_ps(x, sign));
}

/* The first three steps. */
AVX2 static void transform_eights(float *x, int64_t width) {
    const float minus = -0.0f;
    const __m256 ones = _mm256_setr_ps(0, minus, 0, minus, 0, minus, 0, minus);
    const __m256 twos = _mm256_setr_ps(0, 0, minus, minus, 0, 0, minus, minus);
    const __m256 fours = _mm256_setr_ps(0, 0, 0, 0, minus, minus, minus, minus);
    for (int64_t i = 0; i < width; i += 8) {
        __m256 eight = _mm256_loadu_ps(x + i);
        eight = within(eight, _mm256_permute_ps(eight, 0xB1), ones);
        eight = within(eight, _mm256_permute_ps(eight, 0x4E), twos);
        eight = within(eight, _mm256_permute2f128_ps(eight, eight, 1), fours);
        _mm256_storeu_ps(x + i, eight);
    }
}
#endif

static void transform_row(float *x, int64_t width, float factor) {
    int64_t half = 1;
#ifdef X86
    if (width >= 8 && with_avx2()) {
        transform_eights(x, width);
        half = 8;
    }
#endif
    transform_from(x, width, half, factor);
}

WIDEST static void change_signs(float *restrict x, const float *restrict signs, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] *= signs[i];
}

static void rotate_row(float *x, const Rotation *by) {
    const int64_t rest = by->width - by->part;
    change_signs(x, by->first, by->width);
    transform_row(x, by->part, by->factor);
    if (!rest) return;
    change_signs(x + rest, by->second, by->part);
    transform_row(x + rest, by->part, by->factor);
}

static void rotate_row_back(float *x, const Rotation *by) {
    const int64_t rest = by->width - by->part;
    if (rest) {
        transform_row(x + rest, by->part, by->factor);
        change_signs(x + rest, by->second, by->part);
    }
    transform_row(x, by->part, by->factor);
    change_signs(x, by->first, by->width);
}

/* Rotate rows [rows][width] in place. */
EXPORT void bivlm_rotate(float *x, int64_t rows, int64_t width, int64_t part, float factor, const float *first,
                         const float *second, int64_t back) {
    const Rotation by = {width, part, factor, first, second};
    for (int64_t row = 0; row < rows; row++) (back ? rotate_row_back : rotate_row)(x + row * width, &by);
}

/* The weight that levels stand for, see bivlm/numerics/trellis_tiles.py: some columns at a time, each in one piece. */
enum { STRIP = 128 };

static void look_up_plain(const uint8_t *indices, const float *levels, float *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = levels[indices[i] & (LEVELS - 1)];
}

/* Rows i to `rows` and columns c to `columns` of a strip, whose column 0 is the weight's column `left`. */
static void look_up_corner(const uint8_t *const *diagonal, const float *levels, int64_t left, int64_t i, int64_t rows,
                           int64_t c, int64_t columns, float *strip, int64_t apart) {
    for (; i < rows; i++)
        for (int64_t k = c; k < columns; k++)
            strip[k * apart + i] = levels[diagonal[left + k + i][i] & (LEVELS - 1)];
}

static void store_corner(const float *strip, int64_t apart, int64_t i, int64_t rows, int64_t c, int64_t columns,
                         float *out, int64_t out_apart) {
    for (; i < rows; i++)
        for (int64_t k = c; k < columns; k++) out[i * out_apart + k] = strip[k * apart + i];
}

#ifdef X86
AVX2 static inline __m256 eight_levels(__m128i indices, const float *levels) {
    const __m256i index = _mm256_cvtepu8_epi32(indices);
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

AVX2 static void look_up_avx2(const uint8_t *indices, const float *levels, float *to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, eight_levels(_mm_loadl_epi64((const __m128i *)(indices + i)), levels));
    look_up_plain(indices + i, levels, to + i, count - i);
}

/* Sixteen rows from i on of sixteen columns; `diagonal` is that of row 0 and the first of them. Byte k of a column is
   that of the diagonal k further on: each time that `by` doubles, the vectors are right in one more bit of k. */
AVX2 static void look_up_block(const uint8_t *const *diagonal, int64_t i, const float *levels, float *to,
                               int64_t apart) {
    const __m128i row = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i column[31];
    for (int k = 0; k < 31; k++) column[k] = _mm_loadu_si128((const __m128i *)(diagonal[i + k] + i));
    for (int by = 1, count = 31 - by; by < 16; by *= 2, count -= by) {
        const __m128i bit = _mm_set1_epi8((char)by), there = _mm_cmpeq_epi8(_mm_and_si128(row, bit), bit);
        for (int k = 0; k < count; k++) column[k] = _mm_blendv_epi8(column[k], column[k + by], there);
    }
    for (int k = 0; k < 16; k++) {
        _mm256_storeu_ps(to + k * apart + i, eight_levels(column[k], levels));
        _mm256_storeu_ps(to + k * apart + i + 8, eight_levels(_mm_srli_si128(column[k], 8), levels));
    }
}

/* Eight columns' eight rows as eight rows' eight columns. */
AVX2 static inline void store_block(const float *strip, int64_t apart, float *out, int64_t columns) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(strip + i * apart);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * columns, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * columns, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}
#endif

/* A strip's columns of a weight in antidiagonals: `diagonal` is where row 0 of each would be, `end` the last one's. */
static void look_up_diagonals(const uint8_t *const *diagonal, int64_t diagonals, const uint8_t *end,
                              const float *levels, int64_t left, int64_t rows, int64_t count, float *strip,
                              int64_t apart) {
    int64_t i = 0;
#ifdef X86
    for (; with_avx2() && i + 16 <= rows; i += 16) {
        /* Each diagonal lies in a page of its own. */
        const int64_t next = left + count + i + 32;
        for (int64_t d = next; d < next + 16 && d < diagonals; d++) __builtin_prefetch(diagonal[d] + i + 32);
        int64_t c = 0;
        for (; c + 16 <= count && diagonal[left + c + i + 30] + i + 16 <= end; c += 16)
            look_up_block(diagonal + left + c, i, levels, strip + c * apart, apart);
        look_up_corner(diagonal, levels, left, i, i + 16, c, count, strip, apart);
    }
#else
    (void)diagonals, (void)end;
#endif
    look_up_corner(diagonal, levels, left, i, rows, 0, count, strip, apart);
}

static void store_strip(const float *strip, int64_t apart, int64_t rows, int64_t count, float *out, int64_t columns) {
    int64_t i = 0;
#ifdef X86
    for (; with_avx2() && i + 8 <= rows; i += 8) {
        int64_t c = 0;
        for (; c + 8 <= count; c += 8) store_block(strip + c * apart + i, apart, out + i * columns + c, columns);
        store_corner(strip, apart, i, i + 8, c, count, out, columns);
    }
#endif
    store_corner(strip, apart, i, rows, 0, count, out, columns);
}

/* out[rows][columns] of the levels' numbers in tiles' order: by bands, of which `ends` are the last rows (exclusive),
   or without bands by antidiagonals. With `part` the outputs are rotated back. Returns 1 without memory. */
EXPORT int bivlm_trellis_weight(const uint8_t *indices, const float *levels, int64_t rows, int64_t columns,
                                const int64_t *ends, int64_t bands, int64_t part, float factor, const float *first,
                                const float *second, float *out) {
    const Rotation by = {rows, part, factor, first, second};
    void (*look_up)(const uint8_t *, const float *, float *, int64_t) = look_up_plain;
#ifdef X86
    if (with_avx2()) look_up = look_up_avx2;
#endif
    const int64_t apart = (rows + 31) / 16 * 16; /* with a power of two a row's floats would share a place in caches */
    const int64_t diagonals = bands ? 0 : rows + columns - 1;
    float *strip = malloc(sizeof(float) * STRIP * (size_t)apart);
    const uint8_t **diagonal = malloc(sizeof(*diagonal) * (size_t)(diagonals + 1)); /* where row 0 of each would be */
    if (!strip || !diagonal) {
        free(strip), free(diagonal);
        return 1;
    }
    for (int64_t d = 0, at = 0; d < diagonals; d++) {
        const int64_t top = d < columns ? 0 : d - columns + 1;
        diagonal[d] = indices + (at - top);
        at += (d < rows ? d : rows - 1) - top + 1;
    }
    for (int64_t left = 0; left < columns; left += STRIP) {
        const int64_t count = columns - left < STRIP ? columns - left : STRIP;
        if (!bands)
            look_up_diagonals(diagonal, diagonals, indices + rows * columns, levels, left, rows, count, strip, apart);
        for (int64_t b = 0, begin = 0; b < bands; begin = ends[b++])
            for (int64_t c = 0; c < count; c++)
                look_up(indices + begin * columns + (left + c) * (ends[b] - begin), levels, strip + c * apart + begin,
                        ends[b] - begin);
        for (int64_t c = 0; part && c < count; c++) rotate_row_back(strip + c * apart, &by);
        store_strip(strip, apart, rows, count, out + left, columns);
    }
    free(strip), free(diagonal);
    return 0;
}
