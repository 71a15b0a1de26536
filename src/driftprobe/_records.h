/* The scanner of records: plain C, without Python, so that a fuzzer can drive it. _scan.c gives it to Python.
 *
 * A line is taken only if it can be read in one way and needs no second look: a flat record with the fields below, none
 * twice, plain ASCII strings without escapes, numbers of JSON. Any other line is left to trace_file.py, which understands or
 * refuses it. Nothing is read beyond the given length. SPDX-License-Identifier: Apache-2.0 */
#ifndef DRIFTPROBE_RECORDS_H
#define DRIFTPROBE_RECORDS_H
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NONE INT64_MIN
#define MAX_WORDS 4096
#define MAX_WORD 512

/* One line. columns.py has the same layout as a NumPy dtype. */
typedef struct {
    int64_t at, step, token_id, logical_tok_idx, pos_id, nz_count, nan_count, inf_count, row_start, rows_at;
    uint64_t hash;
    double abs_sum, min, max, mean, l2;
    int32_t length, layer, phase, arm, tensor, dtype, shape, source, prompt, sums, rows, taken;
} row;

typedef struct {
    char *text[MAX_WORDS];
    int32_t size[MAX_WORDS];
    int32_t slots[2 * MAX_WORDS];
    int32_t next[MAX_WORDS]; /* the word that came after this one in the same field: a guess */
    int32_t last[32];        /* the last word of each field */
    char is_shape[MAX_WORDS]; /* a word that was read as one: no other may be taken for one */
    int32_t count;
} words;

typedef struct {
    const char *at, *end;
} text;

enum { F_TYPE, F_PROMPT, F_PHASE, F_LAYER, F_TENSOR, F_HASH, F_ARM, F_STEP, F_TOKEN, F_IDX, F_POS, F_DTYPE, F_SHAPE, F_NZ,
       F_ABS, F_MIN, F_MAX, F_MEAN, F_L2, F_NAN, F_INF, F_SKETCH, F_ROWS, F_START, F_SOURCE, F_COUNT };
static const char *const NAMES[F_COUNT] = {
    "type", "prompt", "phase", "layer", "tensor", "hash", "arm", "step", "token_id", "logical_tok_idx", "pos_id", "dtype",
    "shape", "nz_count", "abs_sum", "min", "max", "mean", "l2", "nan_count", "inf_count", "sketch", "rows", "row_start",
    "source"};
static const unsigned char SIZES[F_COUNT] = {4, 6, 5, 5, 6, 4, 3, 4, 8, 15, 6, 5, 5, 8, 7, 3, 3, 4, 2, 9, 9, 6, 4, 9, 6};
#define NEEDED ((1u << F_TYPE) | (1u << F_PROMPT) | (1u << F_PHASE) | (1u << F_LAYER) | (1u << F_TENSOR) | (1u << F_HASH) \
                | (1u << F_ARM))

static void blanks(text *t) {
    while (t->at < t->end && (*t->at == ' ' || *t->at == '\t')) t->at++;
}

/* Take one character, with blanks around it. */
static int take(text *t, char c) {
    blanks(t);
    if (t->at >= t->end || *t->at != c) return 0;
    t->at++;
    blanks(t);
    return 1;
}

/* Take a string of printable ASCII without escapes. */
static int string(text *t, const char **start, size_t *size) {
    if (t->at >= t->end || *t->at != '"') return 0;
    *start = ++t->at;
    while (t->at < t->end && *t->at != '"') {
        unsigned char c = (unsigned char)*t->at;
        if (c < 0x20 || c > 0x7e || c == '\\') return 0;
        t->at++;
    }
    if (t->at >= t->end) return 0;
    *size = (size_t)(t->at++ - *start);
    return 1;
}

/* Append eight digits at once; 0 where there are fewer. Bytes are numbers here, so that the order of bytes counts. */
static int eight(const char *at, const char *end, uint64_t *value) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint64_t d;
    if (end - at < 8) return 0;
    memcpy(&d, at, 8);
    if ((d & 0xf0f0f0f0f0f0f0f0u) != 0x3030303030303030u) return 0;
    d &= 0x0f0f0f0f0f0f0f0fu;
    if ((d + 0x0606060606060606u) & 0xf0f0f0f0f0f0f0f0u) return 0;  /* one above nine */
    d = (d * 10 + (d >> 8)) & 0x00ff00ff00ff00ffu;                  /* pairs */
    d = (d * 100 + (d >> 16)) & 0x0000ffff0000ffffu;                /* fours */
    d = (d * 10000 + (d >> 32)) & 0xffffffffu;
    *value = *value * 100000000u + d;
    return 1;
#else
    (void)at, (void)end, (void)value;
    return 0;
#endif
}

/* Take digits; `count` leaves zeros at the front out, and only 19 of those that are counted go into the value. */
static int digits(text *t, uint64_t *value, int *count) {
    const char *at = t->at, *first;
    uint64_t found = *value;
    int more;
    if (!*count)
        while (at < t->end && *at == '0') at++;
    first = at;
    while (*count + (at - first) + 8 <= 19 && eight(at, t->end, &found)) at += 8;
    for (; at < t->end && (unsigned char)(*at - '0') < 10; at++) {
        if (*count + (at - first) < 19) found = found * 10u + (uint64_t)(*at - '0');
    }
    more = at > t->at;
    *count += at - first > 1000 ? 1000 : (int)(at - first);
    *value = found, t->at = at;
    return more;
}

/* Take an integer of at most 18 digits. */
static int integer(text *t, int64_t *value) {
    uint64_t size = 0;
    int count = 0, negative = t->at < t->end && *t->at == '-';
    const char *start;
    t->at += negative;
    start = t->at;
    if (!digits(t, &size, &count) || count > 18 || (*start == '0' && t->at - start > 1) || (negative && !size)) return 0;
    if (t->at < t->end && (*t->at == '.' || *t->at == 'e' || *t->at == 'E')) return 0;
    *value = negative ? -(int64_t)size : (int64_t)size;
    return 1;
}

/* m · 10^e to the nearest double, or 0 where that is not sure to be the nearest. */
static int scaled(uint64_t m, int e, double *value) {
#if LDBL_MANT_DIG == 64 && defined(__x86_64__)
    static const long double TEN[28] = {1e0L,  1e1L,  1e2L,  1e3L,  1e4L,  1e5L,  1e6L,  1e7L,  1e8L,  1e9L,
                                        1e10L, 1e11L, 1e12L, 1e13L, 1e14L, 1e15L, 1e16L, 1e17L, 1e18L, 1e19L,
                                        1e20L, 1e21L, 1e22L, 1e23L, 1e24L, 1e25L, 1e26L, 1e27L};
    long double wide;
    uint64_t mantissa;
    int low;
    if (e < -27 || e > 27) return 0;
    wide = e < 0 ? (long double)m / TEN[-e] : (long double)m * TEN[e];
    memcpy(&mantissa, &wide, sizeof mantissa);
    low = (int)(mantissa & 0x7ff);
    if (low >= 0x3ff && low <= 0x401) return 0; /* rounded once to 64 bits, it may be either side of a double's half */
    *value = (double)wide;
    return 1;
#else
    static const double TEN[23] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                   1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    if (m >> 53 || e < -22 || e > 22) return 0;
    *value = e < 0 ? (double)m / TEN[-e] : (double)m * TEN[e];
    return 1;
#endif
}

/* Take a finite number, as the nearest double. */
static int number(text *t, double *value) {
    const char *start = t->at, *whole, *point;
    uint64_t m = 0, power = 0;
    int count = 0, shift = 0, negative = t->at < t->end && *t->at == '-', down = 0, fraction = 0, places = 0;
    char copy[64], *end;
    t->at += negative;
    whole = t->at;
    if (!digits(t, &m, &count) || (*whole == '0' && t->at - whole > 1)) return 0;
    if (t->at < t->end && *t->at == '.') {
        point = ++t->at;
        if (!digits(t, &m, &count)) return 0;
        fraction = 1, shift = -(int)(t->at - point);
    }
    if (t->at < t->end && (*t->at == 'e' || *t->at == 'E')) {
        t->at++;
        down = t->at < t->end && *t->at == '-';
        t->at += t->at < t->end && (*t->at == '-' || *t->at == '+');
        if (!digits(t, &power, &places) || power > 400) return 0;
        shift += down ? -(int)power : (int)power, fraction = 1;
    }
    if (!m && count == 0) {
        *value = negative ? -0.0 : 0.0;
        return fraction || !negative;
    }
    if (count <= 19 && scaled(m, shift, value)) {
        *value = negative ? -*value : *value;
        return 1;
    }
    if ((size_t)(t->at - start) >= sizeof copy) return 0;
    memcpy(copy, start, (size_t)(t->at - start));
    copy[t->at - start] = 0;
    *value = strtod(copy, &end);
    return *end == 0 && isfinite(*value);
}

static int hash(text *t, uint64_t *value) {
    int i;
    if (t->end - t->at < 20 || t->at[0] != '"' || t->at[1] != '0' || t->at[2] != 'x' || t->at[19] != '"') return 0;
    *value = 0;
    for (i = 3; i < 19; i++) {
        char c = t->at[i];
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0) return 0;
        *value = *value << 4 | (uint64_t)digit;
    }
    t->at += 20;
    return 1;
}

/* The number of a word, which is kept when it is seen first; -1 where there are too many or it is too long. */
static int32_t word(words *known, const char *start, size_t size) {
    uint32_t mix = 2166136261u, slot;
    size_t i;
    if (size > MAX_WORD) return -1;
    for (i = 0; i < size; i++) mix = (mix ^ (unsigned char)start[i]) * 16777619u;
    for (slot = mix % (2 * MAX_WORDS); known->slots[slot]; slot = (slot + 1) % (2 * MAX_WORDS)) {
        int32_t found = known->slots[slot] - 1;
        if ((size_t)known->size[found] == size && !memcmp(known->text[found], start, size)) return found;
    }
    if (known->count == MAX_WORDS || !(known->text[known->count] = (char *)malloc(size + 1))) return -1;
    memcpy(known->text[known->count], start, size);
    known->size[known->count] = (int32_t)size;
    known->slots[slot] = known->count + 1;
    return known->count++;
}

/* The word that is likely next in a field, if it is what stands there between `open` and `close`; -1 if not. */
static int32_t guessed(text *t, const words *known, int which, char open, char close) {
    int32_t guess = known->next[known->last[which]];
    int64_t size, ends = open != 0;
    if (guess >= known->count) return -1;
    size = known->size[guess];
    if (t->end - t->at < size + 2 * ends || (ends && *t->at != open)) return -1;
    if (memcmp(t->at + ends, known->text[guess], (size_t)size) || (ends && t->at[size + 1] != close)) return -1;
    t->at += size + 2 * ends;
    return guess;
}

/* Note which word a field had, so that the next can be guessed. */
static void learn(words *known, int which, int32_t id) {
    known->next[known->last[which]] = id;
    known->last[which] = id;
}

static int named(text *t, words *known, int which, int32_t *id) {
    const char *start;
    size_t size;
    if ((*id = guessed(t, known, which, '"', '"')) < 0) {
        if (!string(t, &start, &size) || (*id = word(known, start, size)) < 0) return 0;
    }
    return learn(known, which, *id), 1;
}

/* The axes of a shape, taken as one word. */
static int shape(text *t, words *known, int which, int32_t *id) {
    const char *start = t->at;
    int64_t axis;
    if (known->is_shape[known->next[known->last[which]]] && (*id = guessed(t, known, which, 0, 0)) >= 0) return learn(known, which, *id), 1;
    if (!take(t, '[')) return 0;
    if (t->at < t->end && *t->at != ']')
        do {
            if (!integer(t, &axis) || axis < 0) return 0;
        } while (take(t, ','));
    if (t->at >= t->end || *t->at != ']') return 0;
    t->at++;
    if ((*id = word(known, start, (size_t)(t->at - start))) < 0) return 0;
    return known->is_shape[*id] = 1, learn(known, which, *id), 1;
}

typedef struct {
    row *rows;
    double *sums;
    uint64_t *hashes;
    int64_t room_rows, room_sums, room_hashes, used_sums, used_hashes, sketch_size, sums_before, hashes_before;
    words *known;
    int full;
} sink;

static int sketch(text *t, sink *out, row *r) {
    int64_t i;
    if (out->used_sums + out->sketch_size > out->room_sums) return out->full = 1, 0;
    if (!take(t, '[')) return 0;
    for (i = 0; i < out->sketch_size; i++)
        if ((i && !take(t, ',')) || !number(t, out->sums + out->used_sums + i)) return 0;
    r->sums = (int32_t)((out->sums_before + out->used_sums) / out->sketch_size);
    return take(t, ']');
}

static int hashes(text *t, sink *out, row *r) {
    if (!take(t, '[')) return 0;
    r->rows_at = out->hashes_before + out->used_hashes, r->rows = 0;
    if (t->at < t->end && *t->at == ']') return t->at++, 1;
    do {
        if (out->used_hashes + r->rows >= out->room_hashes) return out->full = 1, 0;
        if (!hash(t, out->hashes + out->used_hashes + r->rows)) return 0;
        r->rows++;
    } while (take(t, ','));
    return take(t, ']');
}

static int layer(text *t, row *r) {
    int64_t value;
    if (t->end - t->at >= 4 && !memcmp(t->at, "null", 4)) return t->at += 4, 1;
    if (!integer(t, &value) || value < 0 || value > 1000000) return 0;
    return r->layer = (int32_t)value, 1;
}

static int field(text *t, int which, sink *out, row *r) {
    const char *start;
    size_t size;
    switch (which) {
    case F_TYPE: return string(t, &start, &size) && size == 6 && !memcmp(start, "record", 6);
    case F_PROMPT: return named(t, out->known, which, &r->prompt);
    case F_PHASE: return named(t, out->known, which, &r->phase);
    case F_LAYER: return layer(t, r);
    case F_TENSOR: return named(t, out->known, which, &r->tensor);
    case F_HASH: return hash(t, &r->hash);
    case F_ARM: return named(t, out->known, which, &r->arm);
    case F_STEP: return integer(t, &r->step);
    case F_TOKEN: return integer(t, &r->token_id);
    case F_IDX: return integer(t, &r->logical_tok_idx);
    case F_POS: return integer(t, &r->pos_id);
    case F_DTYPE: return named(t, out->known, which, &r->dtype);
    case F_SHAPE: return shape(t, out->known, which, &r->shape);
    case F_NZ: return integer(t, &r->nz_count);
    case F_ABS: return number(t, &r->abs_sum);
    case F_MIN: return number(t, &r->min);
    case F_MAX: return number(t, &r->max);
    case F_MEAN: return number(t, &r->mean);
    case F_L2: return number(t, &r->l2);
    case F_NAN: return integer(t, &r->nan_count);
    case F_INF: return integer(t, &r->inf_count);
    case F_SKETCH: return sketch(t, out, r);
    case F_ROWS: return hashes(t, out, r);
    case F_START: return integer(t, &r->row_start);
    default: return named(t, out->known, which, &r->source);
    }
}

/* The number of a field's name; most lines have them in one order. */
static int which_field(const char *name, size_t size, int guess) {
    int i, at = guess;
    for (i = 0; i < F_COUNT; i++, at++) {
        if (at >= F_COUNT) at = 0;
        if (SIZES[at] == size && NAMES[at][0] == name[0] && !memcmp(NAMES[at], name, size)) return at;
    }
    return -1;
}

/* Take a field's name and colon, as our own writer puts them, if it is the one that comes next in most lines. */
static int foretold(text *t, int which) {
    int64_t size = which < F_COUNT ? SIZES[which] : 0;
    if (!size || t->end - t->at < size + 3 || t->at[0] != '"' || t->at[size + 1] != '"' || t->at[size + 2] != ':') return 0;
    if (memcmp(t->at + 1, NAMES[which], (size_t)size)) return 0;
    t->at += size + 3;
    return blanks(t), 1;
}

/* Read one line, without its end; 0 where it is not ours to read. */
static int record(text *t, sink *out, row *r) {
    const char *name;
    size_t size;
    uint32_t seen = 0;
    int which = -1;
    r->step = 0, r->row_start = 0, r->layer = -1;
    r->token_id = r->logical_tok_idx = r->pos_id = r->nz_count = r->nan_count = r->inf_count = NONE;
    r->abs_sum = r->min = r->max = r->mean = r->l2 = NAN;
    r->dtype = r->shape = r->source = r->sums = r->rows = -1;
    if (!take(t, '{')) return 0;
    do {
        which++;
        if (!foretold(t, which)) {
            if (!string(t, &name, &size) || !take(t, ':')) return 0;
            which = which_field(name, size, which);
        }
        if (which < 0 || seen >> which & 1u || !field(t, which, out, r)) return 0;
        seen |= 1u << which;
    } while (take(t, ','));
    return take(t, '}') && t->at == t->end && (seen & NEEDED) == NEEDED;
}

static int64_t scan_lines(const char *data, int64_t length, int64_t base, sink *out, int64_t *rows) {
    int64_t at = 0;
    while (at < length && *rows < out->room_rows) {
        const char *end = (const char *)memchr(data + at, '\n', (size_t)(length - at));
        row *r = out->rows + *rows;
        text t;
        if (!end) break;
        if (end - data - at > INT32_MAX - 1) break;
        t.at = data + at, t.end = end;
        memset(r, 0, sizeof *r);
        r->at = base + at, r->length = (int32_t)(end - t.at + 1);
        r->taken = record(&t, out, r);
        if (out->full) break;
        if (r->taken) {
            out->used_sums += r->sums >= 0 ? out->sketch_size : 0;
            out->used_hashes += r->rows > 0 ? r->rows : 0;
        }
        at += r->length, ++*rows;
    }
    return at;
}
#endif
