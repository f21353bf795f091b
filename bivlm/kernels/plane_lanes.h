/* The kernel of `plane_product.c` for one width of vectors: included once for each, with these defined.

   W        floats of a vector
   ROWS(T)  rows that are multiplied by T tokens together
   TARGET   the instructions that may be used
   NAME(x)  what x is called for this width
   V, I     vectors of floats and of 32-bit integers; and functions on them */

/* The symbols of W words, and what of them is still to come. */
typedef struct {
    I low, high;
} NAME(Words);

TARGET static inline __attribute__((always_inline)) NAME(Words)
    NAME(words_at)(const int kind, const Rows *rows, int r, int64_t block) {
    NAME(Words) words = {SET_I(0), SET_I(0)};
    if (kind == THREE) words.high = SHIFT_LEFT(SHORTS(rows->planes[1][r] + 2 * W * block), 2);
    if (kind <= EIGHT) {
        words.low = LOAD_I(rows->planes[0][r] + 4 * W * block);
        return words;
    }
    words.low = BYTES(rows->planes[0][r] + W * block);
    int above = 8;
    for (int plane = 1; plane < 3 && PLANE_BITS(kind, plane); plane++) {
        const int bits = PLANE_BITS(kind, plane);
        const I part = AND(FIELDS(bits, rows->planes[plane][r] + W * bits / 8 * block), SET_I((1 << bits) - 1));
        words.low = OR(words.low, SHIFT_LEFT(part, above));
        above += bits;
    }
    return words;
}

/* The next symbol of each word; above it there are bits of the others. */
TARGET static inline __attribute__((always_inline)) I NAME(next)(const int kind, NAME(Words) *words) {
    const I low = words->low, high = words->high;
    switch (kind) {
    case ONE: words->low = SHIFT_RIGHT(low, 1); return low;
    case TWO: words->low = SHIFT_RIGHT(low, 2); return low;
    case FOUR: words->low = SHIFT_RIGHT(low, 4); return low;
    case EIGHT: words->low = SHIFT_RIGHT(low, 8); return low;
    case THREE:
        words->low = SHIFT_RIGHT(low, 2), words->high = SHIFT_RIGHT(high, 1);
        return CHOOSE(SET_I(3), low, high);
    default: /* division by what 65536 / RECIPROCAL is, near enough below 2^13 */
        words->low = HIGH_PRODUCT(low, SET_I(RECIPROCAL(kind)));
        return SUBTRACT(low, LOW_PRODUCT(words->low, SET_I(BASE(kind))));
    }
}

TARGET static inline __attribute__((always_inline)) V NAME(level)(const int kind, const int coded, const V *table,
                                                                 I symbol) {
    if (coded && (kind == EIGHT || (kind == FOUR && W == 8)))
        return FLOATS(AND(symbol, SET_I(kind == FOUR ? 15 : 255)));
    return LOOK_UP(kind == FOUR || kind >= BASE_10, table, symbol);
}

/* Of a block of coded weights: what a row's numbers are multiplied by, word by word, and what is added to that. */
typedef struct {
    V scale, offset;
} NAME(Factors);

TARGET static inline __attribute__((always_inline)) NAME(Factors)
    NAME(factors_at)(const PlaneProduct *by, const Rows *rows, int r, int64_t block) {
    const I group = LOAD_I(by->group + W * block);
    return (NAME(Factors)){PERMUTE(LOAD(rows->scales[r] + by->first_group[block]), group),
                           PERMUTE(LOAD(rows->offsets[r] + by->first_group[block]), group)};
}

/* A total with a block's sums of one token, whose words lie at `word`. */
TARGET static inline __attribute__((always_inline)) V NAME(with_scaled)(const int bytes, const PlaneProduct *by,
                                                                       NAME(Factors) factors, int64_t word, V sum,
                                                                       V total) {
    const V up = bytes ? MULTIPLY(factors.scale, LOAD(by->input_scales + word)) : factors.scale;
    return FMA(up, sum, FMA(factors.offset, LOAD(by->sums + word), total));
}

/* y[row][token] of some rows and tokens. Of coded weights a block's sum is scaled, group by group. */
TARGET static inline __attribute__((always_inline)) void NAME(rows_by)(const int kind, const int coded,
                                                                      const int first, const int R, const int T,
                                                                      const PlaneProduct *by, const Rows *rows,
                                                                      int64_t token, float *y) {
    V total[MOST][MOST], table[MOST][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        for (int t = 0; t < T; t++) total[r][t] = ZERO;
        table[r][0] = LOAD(rows->tables[first + r]), table[r][1] = LOAD(rows->tables[first + r] + 16 - W);
    }
    const int64_t in_apart = by->blocks * STEPS(kind) * W;
    const float *x = by->inputs + token * in_apart;
    for (int64_t block = 0; block < by->blocks; block++, x += STEPS(kind) * W) {
        NAME(Words) words[MOST];
        V sum[MOST][MOST];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            words[r] = NAME(words_at)(kind, rows, first + r, block);
            if (T == 1) _mm_prefetch((const char *)rows->planes[0][first + r] + 4 * W * block + AHEAD, _MM_HINT_T0);
            for (int t = 0; t < T; t++) sum[r][t] = coded ? ZERO : total[r][t];
        }
        for (int step = 0; step < STEPS(kind); step++) {
            V level[MOST];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) level[r] = NAME(level)(kind, coded, table[r], NAME(next)(kind, words + r));
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const V input = LOAD(x + t * in_apart + step * W);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sum[r][t] = FMA(level[r], input, sum[r][t]);
            }
        }
        if (coded) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const NAME(Factors) factors = NAME(factors_at)(by, rows, first + r, block);
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) {
                    const int64_t word = ((token + t) * by->blocks + block) * W;
                    total[r][t] = NAME(with_scaled)(0, by, factors, word, sum[r][t], total[r][t]);
                }
            }
        } else
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int t = 0; t < T; t++) total[r][t] = sum[r][t];
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[(first + r) * T + t] = SUM(total[r][t]);
}

/* The same of all rows, ROWS(T) at a time, for any kind. */
#define KIND(kind, coded, T)                                                                                        \
    case kind:                                                                                                      \
        for (int r = 0; r < MOST; r += ROWS(T)) NAME(rows_by)(kind, coded, r, ROWS(T), T, by, rows, token, y);      \
        break;
#define TOKENS(T)                                                                                               \
    TARGET static void NAME(times_##T)(const PlaneProduct *by, const Rows *rows, int64_t token, float *y) {     \
        if (by->scales)                                                                                         \
            switch (by->kind) { KIND(TWO, 1, T) KIND(THREE, 1, T) KIND(FOUR, 1, T) KIND(EIGHT, 1, T) }          \
        else                                                                                                    \
            switch (by->kind) {                                                                                 \
                KIND(ONE, 0, T) KIND(TWO, 0, T) KIND(THREE, 0, T) KIND(FOUR, 0, T)              \
                KIND(BASE_6, 0, T) KIND(BASE_10, 0, T) KIND(BASE_12, 0, T) KIND(BASE_14, 0, T)                  \
            }                                                                                                   \
    }
TOKENS(1)
TOKENS(2)
#undef TOKENS
#undef KIND

/* Inputs of a byte. The words whose symbols come next, those of every fourth column, a byte each. */
TARGET static inline __attribute__((always_inline)) NAME(Words)
    NAME(byte_words_at)(const int kind, const Rows *rows, int r, int64_t block) {
    NAME(Words) words = {LOAD_I(rows->planes[0][r] + 4 * W * block), SET_I(0)};
    if (kind != THREE) return words;
    /* four bits of each sixteen to a byte */
    I high = SHORTS(rows->planes[1][r] + 2 * W * block);
    high = AND(OR(high, SHIFT_LEFT(high, 8)), SET_I(0x00FF00FF));
    words.high = AND(OR(high, SHIFT_LEFT(high, 4)), SET_I(0x0F0F0F0F));
    return words;
}

TARGET static inline __attribute__((always_inline)) I NAME(next_bytes)(const int kind, NAME(Words) *words) {
    const I low = words->low, high = words->high;
    switch (kind) {
    case ONE: words->low = SHIFT_RIGHT(low, 1); return AND(low, SET_I(0x01010101));
    case TWO: words->low = SHIFT_RIGHT(low, 2); return AND(low, SET_I(0x03030303));
    case FOUR: words->low = SHIFT_RIGHT(low, 4); return AND(low, SET_I(0x0F0F0F0F));
    case THREE:
        words->low = SHIFT_RIGHT(low, 2), words->high = SHIFT_RIGHT(high, 1);
        return OR(AND(low, SET_I(0x03030303)), SHIFT_LEFT(AND(high, SET_I(0x01010101)), 2));
    default: return low;
    }
}

/* y[row][token] of some rows and tokens, inputs of a byte: products of bytes are added up exactly, word by word. */
BYTE_TARGET static inline __attribute__((always_inline)) void NAME(byte_rows_by)(const int kind, const int coded,
                                                                                const int first, const int R,
                                                                                const int T, const PlaneProduct *by,
                                                                                const Rows *rows, int64_t token,
                                                                                float *y) {
    V total[MOST][MOST];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) total[r][t] = ZERO;
    const I levels = coded ? SET_I(0) : SIXTEEN_BYTES(by->level_bytes);
    const int64_t in_apart = by->blocks * STEPS(kind) * W;
    const int8_t *x = by->bytes + token * in_apart;
    for (int64_t block = 0; block < by->blocks; block++, x += STEPS(kind) * W) {
        NAME(Words) words[MOST];
        I sum[MOST][MOST];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            words[r] = NAME(byte_words_at)(kind, rows, first + r, block);
            if (T == 1) _mm_prefetch((const char *)rows->planes[0][first + r] + 4 * W * block + AHEAD, _MM_HINT_T0);
            for (int t = 0; t < T; t++) sum[r][t] = SET_I(0);
        }
        for (int step = 0; step < STEPS(kind) / 4; step++) {
            I level[MOST];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                level[r] = NAME(next_bytes)(kind, words + r);
                if (!coded) level[r] = SHUFFLE(levels, level[r]);
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const I input = LOAD_I(x + t * in_apart + 4 * W * step);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sum[r][t] = DOT(kind, sum[r][t], level[r], input);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const NAME(Factors) factors = coded ? NAME(factors_at)(by, rows, first + r, block) : (NAME(Factors)){ZERO, ZERO};
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int64_t word = ((token + t) * by->blocks + block) * W;
                const V exact = FLOATS(sum[r][t]);
                total[r][t] = coded ? NAME(with_scaled)(1, by, factors, word, exact, total[r][t])
                                    : FMA(exact, LOAD(by->input_scales + word), total[r][t]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            const float added = SUM(total[r][t]);
            y[(first + r) * T + t] = coded ? added : by->level_unit * added + by->lowest_level * by->token_sums[token + t];
        }
}

#define KIND(kind, coded, T)                                                                                         \
    case kind:                                                                                                       \
        for (int r = 0; r < MOST; r += BYTE_ROWS(T))                                                                 \
            NAME(byte_rows_by)(kind, coded, r, BYTE_ROWS(T), T, by, rows, token, y);                                 \
        break;
#define TOKENS(T)                                                                                                    \
    BYTE_TARGET static void NAME(byte_times_##T)(const PlaneProduct *by, const Rows *rows, int64_t token, float *y) { \
        if (by->scales)                                                                                              \
            switch (by->kind) { KIND(TWO, 1, T) KIND(THREE, 1, T) KIND(FOUR, 1, T) KIND(EIGHT, 1, T) }               \
        else                                                                                                         \
            switch (by->kind) { KIND(ONE, 0, T) KIND(TWO, 0, T) KIND(THREE, 0, T) KIND(FOUR, 0, T) }                 \
    }
TOKENS(1)
TOKENS(2)
#undef TOKENS
#undef KIND

/* Many tokens: levels of a panel of rows are made once, then multiplied by some tokens after the others. The sums are
   those that few tokens have: `totals` [rows][tokens][lanes] go on from panel to panel. */

/* The levels of a row from block `begin` on, a vector a step. */
TARGET static inline __attribute__((always_inline)) void NAME(write_levels)(const int kind, const int coded,
                                                                           const Rows *rows, int r, int64_t begin,
                                                                           int64_t end, float *levels) {
    const V table[2] = {LOAD(rows->tables[r]), LOAD(rows->tables[r] + 16 - W)};
    for (int64_t block = begin; block < end; block++) {
        NAME(Words) words = NAME(words_at)(kind, rows, r, block);
        for (int step = 0; step < STEPS(kind); step++, levels += W)
            STORE(levels, NAME(level)(kind, coded, table, NAME(next)(kind, &words)));
    }
}

TARGET static inline __attribute__((always_inline)) void NAME(write_bytes)(const int kind, const int coded,
                                                                          const uint8_t *level_bytes, const Rows *rows,
                                                                          int r, int64_t begin, int64_t end,
                                                                          uint8_t *levels) {
    const I table = coded ? SET_I(0) : SIXTEEN_BYTES(level_bytes);
    for (int64_t block = begin; block < end; block++) {
        NAME(Words) words = NAME(byte_words_at)(kind, rows, r, block);
        for (int step = 0; step < STEPS(kind) / 4; step++, levels += 4 * W) {
            const I symbols = NAME(next_bytes)(kind, &words);
            STORE_I(levels, coded ? symbols : SHUFFLE(table, symbols));
        }
    }
}

#define WRITE(kind, coded)                                                                                          \
    case kind:                                                                                                      \
        for (int r = 0; r < MOST; r++) NAME(write_levels)(kind, coded, rows, r, begin, end, levels + r * PANEL);    \
        break;
TARGET static void NAME(all_levels)(const PlaneProduct *by, const Rows *rows, int64_t begin, int64_t end,
                                    float *levels) {
    if (by->scales)
        switch (by->kind) { WRITE(TWO, 1) WRITE(THREE, 1) WRITE(FOUR, 1) WRITE(EIGHT, 1) }
    else
        switch (by->kind) {
            WRITE(ONE, 0) WRITE(TWO, 0) WRITE(THREE, 0) WRITE(FOUR, 0)
            WRITE(BASE_6, 0) WRITE(BASE_10, 0) WRITE(BASE_12, 0) WRITE(BASE_14, 0)
        }
}
#undef WRITE
#define WRITE(kind, coded)                                                                                         \
    case kind:                                                                                                     \
        for (int r = 0; r < MOST; r++)                                                                             \
            NAME(write_bytes)(kind, coded, by->level_bytes, rows, r, begin, end, levels + r * PANEL);              \
        break;
TARGET static void NAME(all_bytes)(const PlaneProduct *by, const Rows *rows, int64_t begin, int64_t end,
                                   uint8_t *levels) {
    if (by->scales)
        switch (by->kind) { WRITE(TWO, 1) WRITE(THREE, 1) WRITE(FOUR, 1) WRITE(EIGHT, 1) }
    else
        switch (by->kind) { WRITE(ONE, 0) WRITE(TWO, 0) WRITE(THREE, 0) WRITE(FOUR, 0) }
}
#undef WRITE

/* Adds a row's sums of a block of coded weights to its totals, scaled group by group. */
TARGET static inline __attribute__((always_inline)) void NAME(add_scaled)(const int bytes, const PlaneProduct *by,
                                                                         const Rows *rows, int r, int64_t block,
                                                                         int64_t token, const V *sum, float *total) {
    const NAME(Factors) factors = NAME(factors_at)(by, rows, r, block);
#pragma GCC unroll 4
    for (int t = 0; t < TILE_TOKENS; t++, total += W) {
        const int64_t word = ((token + t) * by->blocks + block) * W;
        STORE(total, NAME(with_scaled)(bytes, by, factors, word, sum[t], LOAD(total)));
    }
}

/* Four rows and some tokens of a panel of floats. */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(const int coded, const int steps,
                                                                   const PlaneProduct *by, const Rows *rows,
                                                                   const float *levels, int64_t token, int64_t begin,
                                                                   int64_t end, float *totals, int64_t apart) {
    enum { T = TILE_TOKENS };
    V sum[MOST][T];
    const int64_t in_apart = by->blocks * steps * W;
    const float *x = by->inputs + token * in_apart + begin * steps * W;
#pragma GCC unroll 4
    for (int r = 0; r < MOST; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) sum[r][t] = coded ? ZERO : LOAD(totals + r * apart + t * W);
    const int64_t blocks = coded ? end - begin : 1, count = coded ? steps : (end - begin) * steps;
    for (int64_t block = begin; block < begin + blocks; block++) {
        for (int64_t step = 0; step < count; step++, x += W, levels += W) {
            V level[MOST];
#pragma GCC unroll 4
            for (int r = 0; r < MOST; r++) level[r] = LOAD(levels + r * PANEL);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const V input = LOAD(x + t * in_apart);
#pragma GCC unroll 4
                for (int r = 0; r < MOST; r++) sum[r][t] = FMA(level[r], input, sum[r][t]);
            }
        }
        if (!coded) break;
#pragma GCC unroll 4
        for (int r = 0; r < MOST; r++) {
            NAME(add_scaled)(0, by, rows, r, block, token, sum[r], totals + r * apart);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) sum[r][t] = ZERO;
        }
    }
    if (coded) return;
#pragma GCC unroll 4
    for (int r = 0; r < MOST; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) STORE(totals + r * apart + t * W, sum[r][t]);
}

/* The same, inputs of a byte: the sum of a word is exact. */
BYTE_TARGET static inline __attribute__((always_inline)) void NAME(byte_tile)(const int coded, const int kind,
                                                                             const int steps, const PlaneProduct *by,
                                                                             const Rows *rows, const uint8_t *levels,
                                                                             int64_t token, int64_t begin, int64_t end,
                                                                             float *totals, int64_t apart) {
    enum { T = TILE_TOKENS };
    (void)kind; /* of which some vectors know nothing */
    const int64_t in_apart = by->blocks * steps * W;
    const int8_t *x = by->bytes + token * in_apart + begin * steps * W;
    for (int64_t block = begin; block < end; block++) {
        I sum[MOST][T];
#pragma GCC unroll 4
        for (int r = 0; r < MOST; r++)
            for (int t = 0; t < T; t++) sum[r][t] = SET_I(0);
        for (int step = 0; step < steps; step += 4, x += 4 * W, levels += 4 * W) {
            I level[MOST];
#pragma GCC unroll 4
            for (int r = 0; r < MOST; r++) level[r] = LOAD_I(levels + r * PANEL);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const I input = LOAD_I(x + t * in_apart);
#pragma GCC unroll 4
                for (int r = 0; r < MOST; r++) sum[r][t] = DOT(kind, sum[r][t], level[r], input);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < MOST; r++) {
            float *total = totals + r * apart;
            V exact[T];
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) exact[t] = FLOATS(sum[r][t]);
            if (coded) {
                NAME(add_scaled)(1, by, rows, r, block, token, exact, total);
                continue;
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; t++, total += W) {
                const V input_scale = LOAD(by->input_scales + ((token + t) * by->blocks + block) * W);
                STORE(total, FMA(exact[t], input_scale, LOAD(total)));
            }
        }
    }
}

#define STEP(steps, coded) \
    case steps: NAME(tile)(coded, steps, by, rows, levels, token, begin, end, totals, apart); break;
TARGET static void NAME(any_tile)(const PlaneProduct *by, const Rows *rows, const float *levels, int64_t token,
                                  int64_t begin, int64_t end, float *totals, int64_t apart) {
    if (by->scales)
        switch (STEPS(by->kind)) { STEP(4, 1) STEP(8, 1) STEP(16, 1) }
    else
        switch (STEPS(by->kind)) { STEP(2, 0) STEP(3, 0) STEP(5, 0) STEP(8, 0) STEP(16, 0) STEP(32, 0) }
}
#undef STEP
#define STEP(kind, coded) \
    case kind: NAME(byte_tile)(coded, kind, STEPS(kind), by, rows, levels, token, begin, end, totals, apart); break;
BYTE_TARGET static void NAME(any_byte_tile)(const PlaneProduct *by, const Rows *rows, const uint8_t *levels,
                                            int64_t token, int64_t begin, int64_t end, float *totals, int64_t apart) {
    if (by->scales)
        switch (by->kind) { STEP(TWO, 1) STEP(THREE, 1) STEP(FOUR, 1) STEP(EIGHT, 1) }
    else
        switch (by->kind) { STEP(ONE, 0) STEP(TWO, 0) STEP(THREE, 0) STEP(FOUR, 0) }
}
#undef STEP

/* The first `tokens` of some fours of rows, a multiple of the tile's. `levels` [fours][MOST][PANEL]. */
TARGET static void NAME(times_many)(const PlaneProduct *by, const Rows *rows, int fours, int64_t row, int64_t last,
                                    int64_t tokens, float *levels, float *totals) {
    const int64_t steps = STEPS(by->kind), panel = PANEL / (steps * W), apart = tokens * W;
    memset(totals, 0, (size_t)(fours * MOST * apart) * sizeof(float));
    for (int64_t begin = 0; begin < by->blocks; begin += panel) {
        const int64_t end = begin + panel < by->blocks ? begin + panel : by->blocks;
        for (int four = 0; four < fours; four++)
            if (by->bytes)
                NAME(all_bytes)(by, rows + four, begin, end, (uint8_t *)(levels + four * MOST * PANEL));
            else
                NAME(all_levels)(by, rows + four, begin, end, levels + four * MOST * PANEL);
        for (int64_t token = 0; token < tokens; token += TILE_TOKENS)
            for (int four = 0; four < fours; four++) {
                float *here = levels + four * MOST * PANEL, *sums = totals + four * MOST * apart + token * W;
                if (by->bytes)
                    NAME(any_byte_tile)(by, rows + four, (uint8_t *)here, token, begin, end, sums, apart);
                else
                    NAME(any_tile)(by, rows + four, here, token, begin, end, sums, apart);
            }
    }
    for (int64_t r = 0; r < fours * MOST && row + r < last; r++)
        for (int64_t token = 0; token < tokens; token++) {
            const float sum = SUM(LOAD(totals + r * apart + token * W));
            by->outputs[token * by->out_apart + row + r] =
                by->bytes && !by->scales ? by->level_unit * sum + by->lowest_level * by->token_sums[token] : sum;
        }
}
