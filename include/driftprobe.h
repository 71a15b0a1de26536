/* driftprobe.h: the trace writer for engines in C (C99) and C++ (C++17). One header, no library but the C library's and
 * xxhash's own header (Debian: libxxhash-dev).
 *
 * In one source file:            #define DRIFTPROBE_IMPLEMENTATION
 *                                #include "driftprobe.h"
 * In every other:                #include "driftprobe.h"
 *
 * What it writes is specified in docs/trace-format.md; `driftprobe validate DIR` checks it, `driftprobe analyze DIR`
 * judges it. docs/engines.md leads from nothing to a verdict.
 *
 *     dp_header header = dp_default_header("p0_short", "as_designed");
 *     dp_trace *trace;
 *     if (dp_open(&trace, "traces/p0_short_as_designed.jsonl", &header) != DP_OK) ...
 *     dp_key key = dp_make_key("P", "prefill_last", 0, layer, "q_proj");
 *     key.position = n;
 *     dp_write(trace, &key, &tensor);
 *     dp_close(trace);
 *
 * Every function returns a dp_status and never aborts. After an error, dp_message says what was wrong; the trace stays
 * open, and what was written stays written. dp_write, dp_event and dp_constant may be called from several threads: they
 * compute in the caller's thread, and lock only to append a line. Lines reach the file whole, so a killed process leaves
 * a valid, incomplete trace; dp_flush says when.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef DRIFTPROBE_H
#define DRIFTPROBE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DP_SCHEMA "driftprobe/trace/1"
#define DP_MAX_DIMS 8
#define DP_SKETCH_SIZE 64
#define DP_NONE INT64_MIN /* a token, position or layer that there is not */

typedef enum dp_status {
    DP_OK = 0,
    DP_BAD_ARGUMENT, /* a field that the format does not allow; nothing was written */
    DP_DUPLICATE,    /* a second record of one key; nothing was written */
    DP_NO_MEMORY,
    DP_NOT_WRITTEN /* the file system refused: disk full, no such folder. Later calls fail as well */
} dp_status;

typedef enum dp_dtype {
    DP_FLOAT64, DP_FLOAT32, DP_FLOAT16, DP_BFLOAT16, DP_FLOAT8_E4M3FN, DP_FLOAT8_E5M2,
    DP_INT64, DP_INT32, DP_INT16, DP_INT8, DP_UINT8, DP_BOOL
} dp_dtype;

/* A tensor where it lies. Strides count elements and may be negative or 0; data is element [0, 0, ...]. Elements are in
 * the machine's own byte order. Heads stand as [token, head, dim], caches as [row, head, dim]: strides make that of any
 * layout without a copy. */
typedef struct dp_tensor {
    const void *data;
    int dtype; /* one of dp_dtype */
    int ndim;
    int64_t shape[DP_MAX_DIMS];
    int64_t strides[DP_MAX_DIMS];
} dp_tensor;

/* Where a record belongs; see "Record" in docs/trace-format.md. */
typedef struct dp_key {
    const char *arm;    /* "P", "D", "A", "P'", "D'", "E1" ... */
    const char *phase;  /* "prefill_last", "prefill_ext", "decode0" ... */
    int64_t step;       /* decode step, from 0; P and E carry the step that they are compared with */
    int64_t layer;      /* from 0; DP_NONE outside the layers */
    const char *tensor; /* the tap: `driftprobe taps` lists them */
    int64_t token_id;   /* or DP_NONE */
    int64_t position;   /* absolute, from 0; or DP_NONE */
    int64_t pos_id;     /* the position that the engine used, for RoPE say; or DP_NONE */
    int64_t row_start;  /* caches and scores: absolute position of the first row or column */
    int recomputed;     /* not 0 where a fused kernel hides the tensor and it was rebuilt from captured inputs */
} dp_key;

typedef struct dp_pair {
    const char *name, *value;
} dp_pair;
typedef struct dp_count {
    const char *name;
    int64_t value;
} dp_count;
typedef struct dp_read {
    const char *arm, *phase;
    int64_t step, position;
} dp_read;
typedef struct dp_tap {
    const char *name;
    const int64_t *layers; /* NULL for a tap outside the layers */
    size_t layer_count;
} dp_tap;

/* The first line; see "Header" in docs/trace-format.md. Start from dp_default_header. Texts are UTF-8, prompt and
 * mode printable ASCII without slashes; NULL is "". */
typedef struct dp_header {
    const char *prompt, *mode, *run, *prompt_text, *date;
    const int64_t *token_ids;
    size_t token_count;
    int64_t prompt_len, steps, seed, sketch_size;
    const dp_read *reads; /* what the plan asked for */
    size_t read_count;
    const dp_tap *taps; /* what the engine promises */
    size_t tap_count;
    const char *engine, *version, *model, *dtype, *attention, *device;
    int64_t layers, heads, kv_heads, vocabulary, max_positions;
    const dp_pair *casts; /* coarser dtypes used inside, by place: declare every one */
    size_t cast_count;
    int payloads; /* not 0: keep tensors whole, in payloads/<trace>.safetensors beside the trace */
} dp_header;

/* What is kept of a tensor. min, max and mean are 0 where no element is finite. `sketch` has the size asked for. */
typedef struct dp_fingerprint {
    uint64_t hash;
    int64_t nz_count, nan_count, inf_count;
    double abs_sum, min, max, mean, l2;
} dp_fingerprint;

typedef struct dp_trace dp_trace;

dp_header dp_default_header(const char *prompt, const char *mode);
dp_key dp_make_key(const char *arm, const char *phase, int64_t step, int64_t layer, const char *tensor);
/* A tensor in C order. `shape` has ndim numbers. */
dp_tensor dp_make_tensor(const void *data, dp_dtype dtype, int ndim, const int64_t *shape);

dp_status dp_open(dp_trace **trace, const char *path, const dp_header *header);
/* Record one tensor. Row hashes are added for k_cache and v_cache, the largest values for logits. */
dp_status dp_write(dp_trace *trace, const dp_key *key, const dp_tensor *tensor);
/* Record what the model computes with: a weight, an epsilon ("q_proj.weight"). Needs a trace with payloads. */
dp_status dp_constant(dp_trace *trace, int64_t layer, const char *name, const dp_tensor *tensor);
/* Record what no tensor shows, "cache_readback" say, with counts. */
dp_status dp_event(dp_trace *trace, const char *event, const char *arm, int64_t step, const dp_count *counts, size_t n);
/* Hand all whole lines to the operating system. */
dp_status dp_flush(dp_trace *trace);
/* Write the footer, close the file, free the trace. Without it the trace is incomplete, and its verdict N/A. */
dp_status dp_close(dp_trace *trace);
/* What the last error of this trace was, in words; NULL asks for this thread's last dp_open or dp_close. Never NULL. The
 * text is the caller's thread's own, until it asks again. */
const char *dp_message(const dp_trace *trace);
/* The fingerprint alone. `sketch`: sketch_size sums, written; sketch_size is 1 to 65536. */
dp_status dp_fingerprint_of(const dp_tensor *tensor, size_t sketch_size, dp_fingerprint *print, double *sketch);

#ifdef __cplusplus
}
#endif
#endif /* DRIFTPROBE_H */

#ifdef DRIFTPROBE_IMPLEMENTATION
#ifndef DRIFTPROBE_IMPLEMENTED
#define DRIFTPROBE_IMPLEMENTED

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0) || defined(__ASSOCIATIVE_MATH__)
#error "driftprobe.h must be compiled without -ffast-math, -ffinite-math-only and -fassociative-math: it counts NaN and \
infinity, and sums in a fixed order"
#endif
#if defined(__GNUC__) && defined(__cplusplus) /* C, compiled as C++: its casts and conversions are meant */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wold-style-cast"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* of GCC 12's own intrinsics, in C++ alone */
#endif
#endif
#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <windows.h>
typedef SRWLOCK dp__lock;
#define DP__LOCK_INIT(l) InitializeSRWLock(l)
#define DP__LOCK(l) AcquireSRWLockExclusive(l)
#define DP__UNLOCK(l) ReleaseSRWLockExclusive(l)
#define DP__LOCK_END(l) (void)(l)
#define DP__LOCK_STATIC SRWLOCK_INIT
#else
#include <pthread.h>
typedef pthread_mutex_t dp__lock;
#define DP__LOCK_INIT(l) pthread_mutex_init(l, NULL)
#define DP__LOCK(l) pthread_mutex_lock(l)
#define DP__UNLOCK(l) pthread_mutex_unlock(l)
#define DP__LOCK_END(l) pthread_mutex_destroy(l)
#define DP__LOCK_STATIC PTHREAD_MUTEX_INITIALIZER
#endif
#if defined(__cplusplus)
#define DP__THREAD thread_local
#elif defined(_MSC_VER)
#define DP__THREAD __declspec(thread)
#else
#define DP__THREAD __thread
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(DRIFTPROBE_SCALAR)
#include <cpuid.h>
#include <immintrin.h>
#define DP__X86 1
#else
#define DP__X86 0
#endif

/* ---- dtypes: the one door to double ---- */

#define DP__BLOCK 65536 /* elements of a sketch block, less what does not fill the last round of buckets */
#define DP__CHUNK 4096  /* elements that are gathered, hashed and summed while they are in cache */
#define DP__TOP 16
#define DP__MAX_LINE (64u << 20)

static const struct {
    const char *name, *code;
    size_t size;
} dp__dtypes[] = {{"float64", "F64", 8},       {"float32", "F32", 4},      {"float16", "F16", 2}, {"bfloat16", "BF16", 2},
                  {"float8_e4m3fn", "F8_E4M3", 1}, {"float8_e5m2", "F8_E5M2", 1}, {"int64", "I64", 8},   {"int32", "I32", 4},
                  {"int16", "I16", 2},         {"int8", "I8", 1},         {"uint8", "U8", 1},    {"bool", "BOOL", 1}};

static double dp__from_bits32(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* A small float with `exponent` and `mantissa` bits, all ones in the exponent for infinity and NaN, as in IEEE 754. */
static double dp__small_float(unsigned bits, int exponent, int mantissa) {
    unsigned top = (1u << exponent) - 1, e = bits >> mantissa & top, m = bits & ((1u << mantissa) - 1);
    int bias = (1 << (exponent - 1)) - 1;
    double value;
    if (e == top) value = m ? (double)NAN : (double)INFINITY;
    else if (e == 0) value = ldexp((double)m, 1 - bias - mantissa);
    else value = ldexp((double)(m | 1u << mantissa), (int)e - bias - mantissa);
    return bits >> (exponent + mantissa) & 1 ? -value : value;
}

/* float8 e4m3fn has no infinity: only all ones is NaN, and the rest of the top exponent are numbers (Micikevicius 2022). */
static double dp__e4m3fn(unsigned bits) {
    double value;
    if ((bits & 0x7F) == 0x7F) return (double)NAN;
    if ((bits & 0x78) != 0x78) return dp__small_float(bits, 4, 3);
    value = ldexp((double)((bits & 7u) | 8u), 8 - 3);
    return bits & 0x80 ? -value : value;
}

static void dp__to_double(const unsigned char *in, int dtype, size_t n, double *out) {
    size_t i;
#define DP__EACH(T, EXPRESSION)                   \
    for (i = 0; i < n; i++) {                     \
        T v;                                      \
        memcpy(&v, in + i * sizeof(T), sizeof(T)); \
        out[i] = (EXPRESSION);                    \
    }                                             \
    break
    switch (dtype) {
    case DP_FLOAT64: memcpy(out, in, n * 8); break;
    case DP_FLOAT32: DP__EACH(float, (double)v);
    case DP_FLOAT16: DP__EACH(uint16_t, dp__small_float(v, 5, 10));
    case DP_BFLOAT16: DP__EACH(uint16_t, dp__from_bits32((uint32_t)v << 16));
    case DP_FLOAT8_E4M3FN: DP__EACH(unsigned char, dp__e4m3fn(v));
    case DP_FLOAT8_E5M2: DP__EACH(unsigned char, dp__small_float(v, 5, 2));
    case DP_INT64: DP__EACH(int64_t, (double)v);
    case DP_INT32: DP__EACH(int32_t, (double)v);
    case DP_INT16: DP__EACH(int16_t, (double)v);
    case DP_INT8: DP__EACH(int8_t, (double)v);
    case DP_UINT8: DP__EACH(unsigned char, (double)v);
    case DP_BOOL: DP__EACH(unsigned char, v ? 1.0 : 0.0);
    }
#undef DP__EACH
}

/* ---- a tensor's elements in C order, chunk by chunk ---- */

typedef struct dp__cursor {
    const dp_tensor *tensor;
    int64_t index[DP_MAX_DIMS];
    const unsigned char *at;
    size_t left;
    int contiguous, swap;
} dp__cursor;

static int dp__big_endian(void) {
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 0;
}

static int64_t dp__elements(const dp_tensor *t) {
    int64_t n = 1;
    int d;
    for (d = 0; d < t->ndim; d++)
        if (t->shape[d] == 0) return 0; /* the other axes may be of any length */
    for (d = 0; d < t->ndim; d++) n *= t->shape[d];
    return n;
}

static dp__cursor dp__cursor_of(const dp_tensor *t) {
    dp__cursor c;
    int64_t stride = 1;
    int d;
    memset(&c, 0, sizeof c);
    c.tensor = t, c.at = (const unsigned char *)t->data, c.left = (size_t)dp__elements(t);
    c.swap = dp__big_endian() && dp__dtypes[t->dtype].size > 1;
    c.contiguous = 1;
    if (!c.left) return c;
    for (d = t->ndim - 1; d >= 0; d--) {
        if (t->shape[d] != 1 && t->strides[d] != stride) c.contiguous = 0;
        stride *= t->shape[d];
    }
    return c;
}

/* Step over k elements that lie on the last axis; k is at most what is left of it. */
static void dp__advance(dp__cursor *c, int64_t k) {
    const dp_tensor *t = c->tensor;
    int64_t size = (int64_t)dp__dtypes[t->dtype].size;
    int d = t->ndim - 1;
    c->at += t->strides[d] * size * k;
    if ((c->index[d] += k) < t->shape[d]) return;
    for (; d >= 0 && c->index[d] == t->shape[d]; d--) {
        c->at -= t->strides[d] * t->shape[d] * size;
        c->index[d] = 0;
        if (d > 0) c->at += t->strides[d - 1] * size, c->index[d - 1]++;
    }
}

/* The next n elements in C order, in the machine's byte order: where they lie, or copied to `room`. n <= c->left. */
static const unsigned char *dp__take(dp__cursor *c, size_t n, unsigned char *room) {
    const dp_tensor *t = c->tensor;
    size_t size = dp__dtypes[t->dtype].size, done = 0, run, i;
    const unsigned char *data = c->at;
    int last = t->ndim - 1;
    c->left -= n;
    if (c->contiguous) {
        c->at += n * size;
        return data;
    }
    for (; done < n; done += run) {
        run = (size_t)(t->shape[last] - c->index[last]);
        if (run > n - done) run = n - done;
        if (t->strides[last] == 1) memcpy(room + done * size, c->at, run * size);
        else
            for (i = 0; i < run; i++)
                memcpy(room + (done + i) * size, c->at + (int64_t)i * t->strides[last] * (int64_t)size, size);
        dp__advance(c, (int64_t)run);
    }
    return room;
}

/* The same elements as the format has them: little-endian, bool as 0 or 1. `spare` has room for them. */
static const unsigned char *dp__canonical(const dp__cursor *c, const unsigned char *data, size_t n, unsigned char *spare) {
    size_t size = dp__dtypes[c->tensor->dtype].size, i, b;
    if (c->tensor->dtype == DP_BOOL) {
        for (i = 0; i < n; i++) spare[i] = data[i] != 0;
        return spare;
    }
    if (!c->swap) return data;
    for (i = 0; i < n; i++)
        for (b = 0; b < size; b++) spare[i * size + b] = data[i * size + size - 1 - b];
    return spare;
}

/* ---- the fingerprint ---- */

static double dp__saturate(double v) { return v > DBL_MAX ? DBL_MAX : v < -DBL_MAX ? -DBL_MAX : v; }

static double dp__sign(uint64_t i) {
    uint64_t z = (i + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return (z ^ (z >> 31)) >> 63 ? -1.0 : 1.0;
}

typedef struct dp__sums {
    double abs_sum, sum, squares, min, max;
    int64_t nz, finite;
} dp__sums;

/* Add up a chunk's finite elements; NaN and infinity are counted and become 0 in place, as the sketch needs them. */
static dp__sums dp__moments(double *x, size_t n, dp_fingerprint *f) {
    dp__sums s = {0, 0, 0, 0, 0, 0, 0};
    size_t i;
    for (i = 0; i < n; i++) {
        double v = x[i], size = fabs(v);
        if (!(size <= DBL_MAX)) {
            if (v != v) f->nan_count++;
            else f->inf_count++;
            x[i] = 0.0;
            continue;
        }
        if (s.finite == 0 || v < s.min) s.min = v;
        if (s.finite == 0 || v > s.max) s.max = v;
        s.finite++;
        s.nz += v != 0.0;
        s.abs_sum += size, s.sum += v, s.squares += v * v;
    }
    return s;
}

static void dp__pool(dp__sums *all, const dp__sums *part) {
    if (!part->finite) return;
    if (!all->finite || part->min < all->min) all->min = part->min;
    if (!all->finite || part->max > all->max) all->max = part->max;
    all->finite += part->finite, all->nz += part->nz;
    all->abs_sum += part->abs_sum, all->sum += part->sum, all->squares += part->squares;
}

/* Where plain sums over- or underflow: the mean and norm of the elements divided by the largest. */
static void dp__scaled_moments(const dp_tensor *t, double top, int64_t finite, double *room, unsigned char *bytes,
                               dp_fingerprint *f, int mean_too) {
    dp__cursor c = dp__cursor_of(t);
    double sum = 0.0, squares = 0.0;
    while (c.left) {
        size_t n = c.left < DP__CHUNK ? c.left : DP__CHUNK, i;
        dp__to_double(dp__take(&c, n, bytes), t->dtype, n, room);
        for (i = 0; i < n; i++) {
            double v = room[i] / top;
            if (fabs(room[i]) <= DBL_MAX) sum += v, squares += v * v;
        }
    }
    f->l2 = dp__saturate(top * sqrt(squares));
    if (mean_too) f->mean = top * (sum / (double)finite);
}

/* The signs of elements 0, 1, ... as bits (1 is minus), 65536 in a block: made when first asked for, then shared. */
#define DP__SIGN_BLOCKS 1024
static uint64_t *dp__sign_cache[DP__SIGN_BLOCKS];
static dp__lock dp__sign_lock = DP__LOCK_STATIC;

static void dp__make_signs(uint64_t block, uint64_t *bits) {
    uint64_t i, first = block * DP__BLOCK;
    memset(bits, 0, DP__BLOCK / 8);
    for (i = 0; i < DP__BLOCK; i++)
        if (dp__sign(first + i) < 0) bits[i / 64] |= UINT64_C(1) << (i % 64);
}

/* The bits of one block, from the cache; beyond it, or without memory, made in `own`. */
static const uint64_t *dp__signs(uint64_t block, uint64_t *own) {
    const uint64_t *found = NULL;
    if (block < DP__SIGN_BLOCKS) {
        DP__LOCK(&dp__sign_lock);
        if (!dp__sign_cache[block] && (dp__sign_cache[block] = (uint64_t *)malloc(DP__BLOCK / 8)))
            dp__make_signs(block, dp__sign_cache[block]);
        found = dp__sign_cache[block];
        DP__UNLOCK(&dp__sign_lock);
    }
    if (!found) dp__make_signs(block, own), found = own;
    return found;
}

/* One sketch block's running sums, and where in it the next element goes. */
typedef struct dp__sketcher {
    double *sums, *totals;
    size_t size, block, filled, bucket;
    uint64_t next;
    const uint64_t *signs; /* of the 65536 elements around `next` */
    uint64_t *own;
} dp__sketcher;

static void dp__end_block(dp__sketcher *s) {
    size_t b;
    for (b = 0; b < s->size; b++) {
        s->totals[b] = dp__saturate(s->totals[b] + dp__saturate(s->sums[b]));
        s->sums[b] = 0.0;
    }
    s->filled = 0;
}

static void dp__sketch(dp__sketcher *s, const double *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) {
        size_t at = (size_t)(s->next % DP__BLOCK);
        if (at == 0) s->signs = dp__signs(s->next / DP__BLOCK, s->own);
        s->next++;
        s->sums[s->bucket] += s->signs[at / 64] >> (at % 64) & 1 ? -x[i] : x[i];
        if (++s->bucket == s->size) s->bucket = 0;
        if (++s->filled == s->block) dp__end_block(s);
    }
}

typedef struct dp__room {
    XXH3_state_t *state;
    double values[DP__CHUNK];
    unsigned char bytes[DP__CHUNK * 8], spare[DP__CHUNK * 8];
    double sums[DP__BLOCK];
    uint64_t signs[DP__BLOCK / 64];
} dp__room;

static dp__room *dp__new_room(void) {
    dp__room *room = (dp__room *)malloc(sizeof *room);
    if (room && !(room->state = XXH3_createState())) {
        free(room);
        room = NULL;
    }
    return room;
}

static void dp__free_room(dp__room *room) {
    if (room) XXH3_freeState(room->state);
    free(room);
}

/* ---- the same in vectors: whole rounds of 64 buckets, finite elements only ---- */

#if DP__X86
#define DP__AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define DP__AVX2 __attribute__((target("avx2,fma,f16c")))

#ifdef DRIFTPROBE_NO_AVX512 /* for tests: what a machine without it does */
#define DP__HAS_AVX512 0
#else
#define DP__HAS_AVX512 \
    (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
#endif

typedef struct dp__lanes512 {
    __m512d sketch[8], sum[2], abs[2], squares[2];
    __m512 min, max;
    __mmask16 wild; /* elements that are not finite */
    int64_t nz;
} dp__lanes512;

/* Sixteen floats, the ones that go to buckets 16 * quarter and on; `signs` are their 16 bits. */
static inline DP__AVX512 void dp__sixteen(dp__lanes512 *a, __m512 v, unsigned signs, int quarter) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    const __m512d minus = _mm512_set1_pd(-0.0);
    const __m512i bits = _mm512_castps_si512(v), exponent = _mm512_set1_epi32(0x7F800000);
    a->wild = (__mmask16)(a->wild | _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, exponent), exponent));
    a->nz += __builtin_popcount((unsigned)_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ));
    a->min = _mm512_min_ps(a->min, v), a->max = _mm512_max_ps(a->max, v);
    a->sketch[2 * quarter] = _mm512_add_pd(a->sketch[2 * quarter], _mm512_mask_xor_pd(low, (__mmask8)signs, low, minus));
    a->sketch[2 * quarter + 1] =
        _mm512_add_pd(a->sketch[2 * quarter + 1], _mm512_mask_xor_pd(high, (__mmask8)(signs >> 8), high, minus));
    a->sum[0] = _mm512_add_pd(a->sum[0], low), a->sum[1] = _mm512_add_pd(a->sum[1], high);
    a->abs[0] = _mm512_add_pd(a->abs[0], _mm512_abs_pd(low)), a->abs[1] = _mm512_add_pd(a->abs[1], _mm512_abs_pd(high));
    a->squares[0] = _mm512_fmadd_pd(low, low, a->squares[0]), a->squares[1] = _mm512_fmadd_pd(high, high, a->squares[1]);
}

static inline DP__AVX512 __m512 dp__load512(const unsigned char *x, int dtype) {
    if (dtype == DP_FLOAT32) return _mm512_loadu_ps((const float *)(const void *)x);
    const __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)x);
    if (dtype == DP_FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* A chunk of n floats (a multiple of 64) whose first goes to bucket 0. Returns 0, with nothing done, where one is NaN or
 * infinite. */
static inline __attribute__((always_inline)) DP__AVX512 int dp__rounds512(const unsigned char *x, int dtype, size_t n,
                                                                      const uint64_t *signs, double *sums, dp__sums *s) {
    const size_t size = dtype == DP_FLOAT32 ? 4 : 2;
    dp__lanes512 a;
    size_t i;
    int b;
    memset(&a, 0, sizeof a);
    a.min = _mm512_set1_ps(INFINITY), a.max = _mm512_set1_ps(-INFINITY);
    for (b = 0; b < 8; b++) a.sketch[b] = _mm512_loadu_pd(sums + 8 * b);
    for (i = 0; i < n; i += 64) {
        const uint64_t bits = signs[i / 64];
        const unsigned char *at = x + i * size;
        dp__sixteen(&a, dp__load512(at, dtype), (unsigned)(bits & 0xFFFF), 0);
        dp__sixteen(&a, dp__load512(at + 16 * size, dtype), (unsigned)(bits >> 16 & 0xFFFF), 1);
        dp__sixteen(&a, dp__load512(at + 32 * size, dtype), (unsigned)(bits >> 32 & 0xFFFF), 2);
        dp__sixteen(&a, dp__load512(at + 48 * size, dtype), (unsigned)(bits >> 48), 3);
    }
    if (a.wild) return 0;
    for (b = 0; b < 8; b++) _mm512_storeu_pd(sums + 8 * b, a.sketch[b]);
    s->sum = _mm512_reduce_add_pd(_mm512_add_pd(a.sum[0], a.sum[1]));
    s->abs_sum = _mm512_reduce_add_pd(_mm512_add_pd(a.abs[0], a.abs[1]));
    s->squares = _mm512_reduce_add_pd(_mm512_add_pd(a.squares[0], a.squares[1]));
    s->min = (double)_mm512_reduce_min_ps(a.min), s->max = (double)_mm512_reduce_max_ps(a.max);
    s->nz = a.nz, s->finite = (int64_t)n;
    return 1;
}

/* The dtype is a constant in each, so that the loop has no branch. */
static DP__AVX512 int dp__chunk512(const unsigned char *x, int dtype, size_t n, const uint64_t *signs, double *sums, dp__sums *s) {
    if (dtype == DP_FLOAT32) return dp__rounds512(x, DP_FLOAT32, n, signs, sums, s);
    if (dtype == DP_FLOAT16) return dp__rounds512(x, DP_FLOAT16, n, signs, sums, s);
    return dp__rounds512(x, DP_BFLOAT16, n, signs, sums, s);
}

static inline DP__AVX2 __m256 dp__load256(const unsigned char *x, int dtype) {
    if (dtype == DP_FLOAT32) return _mm256_loadu_ps((const float *)(const void *)x);
    const __m128i half = _mm_loadu_si128((const __m128i *)(const void *)x);
    if (dtype == DP_FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline DP__AVX2 double dp__sum256(__m256d v) {
    double lane[4];
    _mm256_storeu_pd(lane, v);
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

static inline __attribute__((always_inline)) DP__AVX2 int dp__rounds256(const unsigned char *x, int dtype, size_t n,
                                                                    const uint64_t *signs, double *sums, dp__sums *s) {
    const size_t size = dtype == DP_FLOAT32 ? 4 : 2;
    const __m256i exponent = _mm256_set1_epi32(0x7F800000), places = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256d minus = _mm256_set1_pd(-0.0);
    __m256d sum = _mm256_setzero_pd(), abs = sum, squares = sum;
    __m256 min = _mm256_set1_ps(INFINITY), max = _mm256_set1_ps(-INFINITY);
    __m256i wild = _mm256_setzero_si256();
    double now[64];
    float lane[8];
    int64_t nz = 0;
    size_t i, g;
    memcpy(now, sums, sizeof now);
    for (i = 0; i < n; i += 64)
        for (g = 0; g < 64; g += 8) {
            const __m256 v = dp__load256(x + (i + g) * size, dtype);
            const __m256d both[2] = {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
            const uint64_t bits = signs[i / 64] >> g;
            int h;
            wild = _mm256_or_si256(wild, _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(v), exponent), exponent));
            nz += __builtin_popcount((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
            min = _mm256_min_ps(min, v), max = _mm256_max_ps(max, v);
            for (h = 0; h < 2; h++) {
                const __m256i four = _mm256_set1_epi64x((int64_t)(bits >> (4 * h)));
                const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(four, places), places);
                const __m256d turned = _mm256_xor_pd(both[h], _mm256_and_pd(_mm256_castsi256_pd(set), minus));
                double *bucket = now + g + 4 * (size_t)h;
                _mm256_storeu_pd(bucket, _mm256_add_pd(_mm256_loadu_pd(bucket), turned));
                sum = _mm256_add_pd(sum, both[h]), abs = _mm256_add_pd(abs, _mm256_andnot_pd(minus, both[h]));
                squares = _mm256_fmadd_pd(both[h], both[h], squares);
            }
        }
    if (!_mm256_testz_si256(wild, wild)) return 0;
    memcpy(sums, now, sizeof now);
    s->sum = dp__sum256(sum), s->abs_sum = dp__sum256(abs), s->squares = dp__sum256(squares);
    _mm256_storeu_ps(lane, min), s->min = (double)lane[0];
    for (g = 1; g < 8; g++) s->min = (double)lane[g] < s->min ? (double)lane[g] : s->min;
    _mm256_storeu_ps(lane, max), s->max = (double)lane[0];
    for (g = 1; g < 8; g++) s->max = (double)lane[g] > s->max ? (double)lane[g] : s->max;
    s->nz = nz, s->finite = (int64_t)n;
    return 1;
}

static DP__AVX2 int dp__chunk256(const unsigned char *x, int dtype, size_t n, const uint64_t *signs, double *sums, dp__sums *s) {
    if (dtype == DP_FLOAT32) return dp__rounds256(x, DP_FLOAT32, n, signs, sums, s);
    if (dtype == DP_FLOAT16) return dp__rounds256(x, DP_FLOAT16, n, signs, sums, s);
    return dp__rounds256(x, DP_BFLOAT16, n, signs, sums, s);
}

/* Compilers know the name of this feature only since 2024. Where there is AVX2 the system keeps its registers too. */
static int dp__has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

/* Compute a chunk in vectors, if this machine, this dtype and this chunk allow it; else return 0, with nothing done. */
static int dp__in_vectors(const unsigned char *data, int dtype, size_t n, dp__sketcher *s, dp__sums *part) {
    size_t at = (size_t)(s->next % DP__BLOCK);
    int done = 0;
    if (dtype != DP_FLOAT32 && dtype != DP_FLOAT16 && dtype != DP_BFLOAT16) return 0;
    if (s->size != 64 || n % 64 || at % 64 || !n) return 0;
    if (at == 0) s->signs = dp__signs(s->next / DP__BLOCK, s->own);
    __builtin_cpu_init();
    if (DP__HAS_AVX512) done = dp__chunk512(data, dtype, n, s->signs + at / 64, s->sums, part);
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && dp__has_f16c())
        done = dp__chunk256(data, dtype, n, s->signs + at / 64, s->sums, part);
    if (done) {
        s->next += n;
        if ((s->filled += n) == s->block) dp__end_block(s);
    }
    return done;
}
#else
static int dp__in_vectors(const unsigned char *data, int dtype, size_t n, dp__sketcher *s, dp__sums *part) {
    (void)data, (void)dtype, (void)n, (void)s, (void)part;
    return 0;
}
#endif

/* The hashes of a tensor's rows, of `bytes` each, taken from its canonical bytes as they go by. */
typedef struct dp__rows {
    uint64_t *hashes;
    size_t bytes, filled;
    XXH3_state_t *state; /* of the row that is begun */
} dp__rows;

static void dp__hash_rows(dp__rows *r, const unsigned char *data, size_t n) {
    while (n) {
        size_t part = r->bytes - r->filled < n ? r->bytes - r->filled : n;
        if (part == r->bytes) {
            *r->hashes++ = XXH3_64bits(data, part);
        } else {
            if (!r->filled) XXH3_64bits_reset(r->state);
            XXH3_64bits_update(r->state, data, part);
            if ((r->filled += part) == r->bytes) *r->hashes++ = XXH3_64bits_digest(r->state), r->filled = 0;
        }
        data += part, n -= part;
    }
}

/* Pass over a tensor once: hash, moments, sketch, and `rows` where they are asked for, of a chunk while it is in cache. */
static void dp__measure(const dp_tensor *t, size_t size, dp_fingerprint *f, double *sketch, dp__rows *rows, dp__room *room) {
    dp__cursor c = dp__cursor_of(t);
    dp__sketcher s;
    const unsigned char *canonical;
    dp__sums all = {0, 0, 0, 0, 0, 0, 0};
    size_t b, element = dp__dtypes[t->dtype].size;
    double top;
    memset(&s, 0, sizeof s);
    s.sums = room->sums, s.totals = sketch, s.size = size, s.block = DP__BLOCK / size * size, s.own = room->signs;
    memset(f, 0, sizeof *f);
    for (b = 0; b < size; b++) sketch[b] = room->sums[b] = 0.0;
    XXH3_64bits_reset(room->state);
    while (c.left) {
        size_t n = c.left < DP__CHUNK ? c.left : DP__CHUNK, whole = n / 64 * 64;
        const unsigned char *data = dp__take(&c, n, room->bytes);
        dp__sums part = {0, 0, 0, 0, 0, 0, 0};
        canonical = dp__canonical(&c, data, n, room->spare);
        XXH3_64bits_update(room->state, canonical, n * element);
        if (rows) dp__hash_rows(rows, canonical, n * element);
        if (dp__in_vectors(data, t->dtype, whole, &s, &part)) {
            dp__pool(&all, &part);
            data += whole * element, n -= whole;
        }
        if (!n) continue;
        dp__to_double(data, t->dtype, n, room->values);
        part = dp__moments(room->values, n, f);
        dp__pool(&all, &part);
        dp__sketch(&s, room->values, n);
    }
    if (s.filled) dp__end_block(&s);
    f->hash = XXH3_64bits_digest(room->state);
    f->nz_count = all.nz, f->min = all.min, f->max = all.max;
    f->abs_sum = dp__saturate(all.abs_sum);
    f->mean = all.finite ? all.sum / (double)all.finite : 0.0;
    f->l2 = sqrt(all.squares);
    top = fabs(all.min) > fabs(all.max) ? fabs(all.min) : fabs(all.max);
    b = !(fabs(f->mean) <= DBL_MAX);
    if (top > 0 && (b || top <= 1e-100 || top >= 1e100))
        dp__scaled_moments(t, top, all.finite, room->values, room->bytes, f, (int)b);
}

/* The hash of row r of the first axis. */
static uint64_t dp__row_hash(const dp_tensor *t, int64_t r, dp__room *room) {
    dp_tensor row = *t;
    dp__cursor c;
    row.shape[0] = 1;
    row.data = (const unsigned char *)t->data + r * t->strides[0] * (int64_t)dp__dtypes[t->dtype].size;
    c = dp__cursor_of(&row);
    XXH3_64bits_reset(room->state);
    while (c.left) {
        size_t n = c.left < DP__CHUNK ? c.left : DP__CHUNK;
        const unsigned char *data = dp__take(&c, n, room->bytes);
        XXH3_64bits_update(room->state, dp__canonical(&c, data, n, room->spare), n * dp__dtypes[t->dtype].size);
    }
    return XXH3_64bits_digest(room->state);
}

static const char *dp__tensor_fault(const dp_tensor *t) {
    int64_t n = 1;
    int d, empty = 0;
    if (!t) return "no tensor";
    if (t->dtype < 0 || t->dtype > DP_BOOL) return "unknown dtype: use one of dp_dtype";
    if (t->ndim < 0 || t->ndim > DP_MAX_DIMS) return "ndim is not 0 to DP_MAX_DIMS";
    for (d = 0; d < t->ndim; d++) {
        if (t->shape[d] < 0) return "an axis is negative";
        if (t->shape[d] == 0) empty = 1;
    }
    for (d = 0; !empty && d < t->ndim; d++) {
        if (t->shape[d] > INT64_MAX / 8 / n) return "a shape of more bytes than there are";
        n *= t->shape[d];
    }
    return !empty && !t->data ? "data is NULL and the shape is not empty" : NULL;
}

dp_status dp_fingerprint_of(const dp_tensor *tensor, size_t sketch_size, dp_fingerprint *print, double *sketch) {
    dp__room *room;
    if (dp__tensor_fault(tensor) || !print || !sketch || sketch_size < 1 || sketch_size > DP__BLOCK) return DP_BAD_ARGUMENT;
    if (!(room = dp__new_room())) return DP_NO_MEMORY;
    dp__measure(tensor, sketch_size, print, sketch, NULL, room);
    dp__free_room(room);
    return DP_OK;
}

dp_tensor dp_make_tensor(const void *data, dp_dtype dtype, int ndim, const int64_t *shape) {
    dp_tensor t;
    int64_t stride = 1;
    int d;
    memset(&t, 0, sizeof t);
    t.data = data, t.dtype = dtype, t.ndim = ndim;
    for (d = ndim < DP_MAX_DIMS ? ndim - 1 : DP_MAX_DIMS - 1; d >= 0; d--) {
        t.shape[d] = shape[d], t.strides[d] = stride;
        stride = (int64_t)((uint64_t)stride * (uint64_t)shape[d]);
    }
    return t;
}

/* ---- text: a line that grows, JSON in UTF-8 ---- */

typedef struct dp__text {
    char *data;
    size_t length, room;
    int failed; /* out of memory, or over the format's longest line */
} dp__text;

static void dp__put(dp__text *t, const char *data, size_t n) {
    if (t->failed || n > DP__MAX_LINE - t->length) {
        t->failed = 1;
        return;
    }
    if (t->length + n > t->room) {
        size_t room = (t->length + n) * 2 + 256;
        char *grown = (char *)realloc(t->data, room);
        if (!grown) {
            t->failed = 1;
            return;
        }
        t->data = grown, t->room = room;
    }
    memcpy(t->data + t->length, data, n);
    t->length += n;
}

static void dp__puts(dp__text *t, const char *s) { dp__put(t, s, strlen(s)); }

static void dp__put_int(dp__text *t, int64_t v) {
    char out[32];
    snprintf(out, sizeof out, "%lld", (long long)v);
    dp__puts(t, out);
}

/* 17 digits read back to the same double; a locale's own decimal mark becomes a point. */
static void dp__put_double(dp__text *t, double v) {
    char out[64], *p;
    snprintf(out, sizeof out, "%.17g", v);
    for (p = out; *p; p++)
        if (!strchr("0123456789+-eE.", *p)) *p = '.';
    dp__puts(t, out);
}

static void dp__put_hash(dp__text *t, uint64_t hash) {
    char out[32];
    snprintf(out, sizeof out, "\"0x%016llx\"", (unsigned long long)hash);
    dp__puts(t, out);
}

/* How many bytes the UTF-8 character at s has; 0 where it is none (RFC 3629: no surrogates, nothing overlong). */
static size_t dp__utf8(const unsigned char *s) {
    if (s[0] < 0x80) return 1;
    if (s[0] >= 0xC2 && s[0] <= 0xDF) return (s[1] & 0xC0) == 0x80 ? 2 : 0;
    if (s[0] >= 0xE0 && s[0] <= 0xEF) {
        if ((s[1] & 0xC0) != 0x80 || (s[2] & 0xC0) != 0x80) return 0;
        if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F)) return 0;
        return 3;
    }
    if (s[0] >= 0xF0 && s[0] <= 0xF4) {
        if ((s[1] & 0xC0) != 0x80 || (s[2] & 0xC0) != 0x80 || (s[3] & 0xC0) != 0x80) return 0;
        if ((s[0] == 0xF0 && s[1] < 0x90) || (s[0] == 0xF4 && s[1] > 0x8F)) return 0;
        return 4;
    }
    return 0;
}

static int dp__is_utf8(const char *s) {
    const unsigned char *p = (const unsigned char *)s;
    while (*p) {
        size_t n = dp__utf8(p);
        if (!n) return 0;
        p += n;
    }
    return 1;
}

static void dp__put_string(dp__text *t, const char *s) {
    dp__puts(t, "\"");
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        char escaped[8];
        if (c == '"' || c == '\\') snprintf(escaped, sizeof escaped, "\\%c", c);
        else if (c < 0x20) snprintf(escaped, sizeof escaped, "\\u%04x", c);
        else {
            dp__put(t, s, 1);
            continue;
        }
        dp__puts(t, escaped);
    }
    dp__puts(t, "\"");
}

/* `,"name":` */
static void dp__name(dp__text *t, const char *name) {
    dp__puts(t, ",\"");
    dp__puts(t, name);
    dp__puts(t, "\":");
}

static void dp__field(dp__text *t, const char *name, const char *value) {
    if (!value) return;
    dp__name(t, name);
    dp__put_string(t, value);
}

static void dp__field_int(dp__text *t, const char *name, int64_t value) {
    if (value == DP_NONE) return;
    dp__name(t, name);
    dp__put_int(t, value);
}

static void dp__field_double(dp__text *t, const char *name, double value) {
    dp__name(t, name);
    dp__put_double(t, value);
}

static void dp__put_ints(dp__text *t, const int64_t *values, size_t n) {
    size_t i;
    dp__puts(t, "[");
    for (i = 0; i < n; i++) {
        if (i) dp__puts(t, ",");
        dp__put_int(t, values[i]);
    }
    dp__puts(t, "]");
}

static void dp__put_doubles(dp__text *t, const double *values, size_t n) {
    size_t i;
    dp__puts(t, "[");
    for (i = 0; i < n; i++) {
        if (i) dp__puts(t, ",");
        dp__put_double(t, values[i]);
    }
    dp__puts(t, "]");
}

/* ---- SHA-256 (FIPS 180-4), for the footer ---- */

typedef struct dp__sha {
    uint32_t h[8];
    uint64_t bytes;
    unsigned char block[64];
} dp__sha;

static const uint32_t dp__sha_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static void dp__sha_init(dp__sha *s) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->h, start, sizeof start);
    s->bytes = 0;
}

static uint32_t dp__rotate(uint32_t v, int n) { return v >> n | v << (32 - n); }

static void dp__sha_block(dp__sha *s, const unsigned char *p) {
    uint32_t w[64], v[8];
    int i;
    for (i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (dp__rotate(a, 7) ^ dp__rotate(a, 18) ^ a >> 3) + w[i - 7] +
               (dp__rotate(b, 17) ^ dp__rotate(b, 19) ^ b >> 10);
    }
    memcpy(v, s->h, sizeof v);
    for (i = 0; i < 64; i++) {
        uint32_t e = v[4], a = v[0];
        uint32_t one = v[7] + (dp__rotate(e, 6) ^ dp__rotate(e, 11) ^ dp__rotate(e, 25)) + ((e & v[5]) ^ (~e & v[6])) +
                       dp__sha_k[i] + w[i];
        uint32_t two = (dp__rotate(a, 2) ^ dp__rotate(a, 13) ^ dp__rotate(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one, v[0] = one + two;
    }
    for (i = 0; i < 8; i++) s->h[i] += v[i];
}

static void dp__sha_add(dp__sha *s, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    while (n) {
        size_t used = (size_t)(s->bytes % 64), part = 64 - used < n ? 64 - used : n;
        memcpy(s->block + used, p, part);
        s->bytes += part, p += part, n -= part;
        if (s->bytes % 64 == 0) dp__sha_block(s, s->block);
    }
}

static void dp__sha_hex(dp__sha s, char *out) {
    static const unsigned char end[64] = {0x80};
    unsigned char length[8];
    uint64_t bits = s.bytes * 8;
    int i;
    for (i = 0; i < 8; i++) length[i] = (unsigned char)(bits >> (56 - 8 * i));
    dp__sha_add(&s, end, (size_t)(s.bytes % 64 < 56 ? 56 - s.bytes % 64 : 120 - s.bytes % 64));
    dp__sha_add(&s, length, 8);
    for (i = 0; i < 8; i++) snprintf(out + 8 * i, 9, "%08lx", (unsigned long)s.h[i]);
}

/* ---- the trace ---- */

typedef struct dp__digest {
    uint64_t low, high;
} dp__digest;

struct dp_trace {
    FILE *file, *spool;
    char *path, *payload_path, *spool_path, *payload_name, *prompt;
    dp__text index; /* the safetensors header, as it grows */
    dp__text lines; /* whole lines that have not gone to the file */
    dp__sha sha;
    int64_t sketch_size, records, events;
    uint64_t spooled;
    dp__digest *keys; /* an open hash table of the keys written */
    size_t key_room, key_count;
    dp__lock lock;
    dp_status broken; /* the file system's refusal, which stays */
    char message[512];
};

#define DP__BUFFER (1u << 20) /* bytes of lines that are kept back at most */
static DP__THREAD char dp__open_message[512], dp__told[512];

static dp_status dp__say(char *message, dp_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, 512, format, args);
    va_end(args);
    return status;
}

const char *dp_message(const dp_trace *trace) {
    dp_trace *t = (dp_trace *)(uintptr_t)trace; /* only its lock is taken */
    if (!t) return dp__open_message;
    DP__LOCK(&t->lock);
    memcpy(dp__told, t->message, sizeof dp__told);
    DP__UNLOCK(&t->lock);
    return dp__told;
}

dp_key dp_make_key(const char *arm, const char *phase, int64_t step, int64_t layer, const char *tensor) {
    dp_key key;
    memset(&key, 0, sizeof key);
    key.arm = arm, key.phase = phase, key.step = step, key.layer = layer, key.tensor = tensor;
    key.token_id = key.position = key.pos_id = DP_NONE;
    return key;
}

dp_header dp_default_header(const char *prompt, const char *mode) {
    dp_header header;
    memset(&header, 0, sizeof header);
    header.prompt = prompt, header.mode = mode;
    header.steps = 1, header.sketch_size = DP_SKETCH_SIZE;
    return header;
}

/* Hand what is buffered to the file; locked by the caller. */
static dp_status dp__drain(dp_trace *t) {
    if (t->broken == DP_OK && t->lines.length) {
        if (fwrite(t->lines.data, 1, t->lines.length, t->file) != t->lines.length || fflush(t->file) != 0)
            t->broken = dp__say(t->message, DP_NOT_WRITTEN, "%s: %s; free some space, or write elsewhere", t->path,
                                strerror(errno));
        t->lines.length = 0;
    }
    return t->broken;
}

/* Append one line and take it into the digest; locked by the caller. */
static dp_status dp__append(dp_trace *t, const dp__text *line, int counts) {
    size_t before = t->lines.length;
    if (t->broken != DP_OK) return t->broken;
    if (before + line->length > DP__BUFFER && dp__drain(t) != DP_OK) return t->broken;
    before = t->lines.length;
    dp__put(&t->lines, line->data, line->length);
    if (t->lines.failed) {
        t->lines.failed = 0, t->lines.length = before;
        return dp__say(t->message, DP_NO_MEMORY, "no memory for a line of %lu bytes", (unsigned long)line->length);
    }
    if (counts) dp__sha_add(&t->sha, line->data, line->length);
    return DP_OK;
}

dp_status dp_flush(dp_trace *t) {
    dp_status status;
    if (!t) return DP_BAD_ARGUMENT;
    DP__LOCK(&t->lock);
    status = dp__drain(t);
    DP__UNLOCK(&t->lock);
    return status;
}

static const char *dp__name_fault(const char *name) {
    const unsigned char *p = (const unsigned char *)name;
    if (!name || !*name || !strcmp(name, ".") || !strcmp(name, "..")) return "is empty, or names a folder";
    for (; *p; p++)
        if (*p < 0x20 || *p >= 0x7F || *p == '/' || *p == '\\') return "is not printable ASCII without slashes";
    return NULL;
}

static void dp__put_engine(dp__text *line, const dp_header *h) {
    size_t i;
    dp__name(line, "engine");
    dp__puts(line, "{\"name\":");
    dp__put_string(line, h->engine && *h->engine ? h->engine : "unknown");
    dp__field(line, "version", h->version);
    dp__field(line, "model", h->model);
    dp__field(line, "dtype", h->dtype);
    dp__field(line, "attention", h->attention);
    dp__field(line, "device", h->device);
    dp__field_int(line, "layers", h->layers);
    dp__field_int(line, "heads", h->heads);
    dp__field_int(line, "kv_heads", h->kv_heads);
    dp__field_int(line, "vocabulary", h->vocabulary);
    dp__field_int(line, "max_positions", h->max_positions);
    dp__name(line, "casts");
    dp__puts(line, "{");
    for (i = 0; i < h->cast_count; i++) {
        if (i) dp__puts(line, ",");
        dp__put_string(line, h->casts[i].name);
        dp__puts(line, ":");
        dp__put_string(line, h->casts[i].value);
    }
    dp__puts(line, "}}");
}

static void dp__put_plan(dp__text *line, const dp_header *h) {
    size_t i;
    dp__name(line, "reads");
    dp__puts(line, "[");
    for (i = 0; i < h->read_count; i++) {
        dp__puts(line, i ? ",{\"arm\":" : "{\"arm\":");
        dp__put_string(line, h->reads[i].arm);
        dp__field(line, "phase", h->reads[i].phase);
        dp__field_int(line, "step", h->reads[i].step);
        dp__field_int(line, "position", h->reads[i].position);
        dp__puts(line, "}");
    }
    dp__puts(line, "]");
    dp__name(line, "taps");
    dp__puts(line, "{");
    for (i = 0; i < h->tap_count; i++) {
        if (i) dp__puts(line, ",");
        dp__put_string(line, h->taps[i].name);
        dp__puts(line, ":");
        dp__put_ints(line, h->taps[i].layers, h->taps[i].layers ? h->taps[i].layer_count : 0);
    }
    dp__puts(line, "}");
}

static void dp__put_header(dp__text *line, const dp_header *h) {
    dp__puts(line, "{\"type\":\"header\",\"schema\":\"" DP_SCHEMA "\"");
    dp__field(line, "prompt", h->prompt);
    dp__field(line, "mode", h->mode);
    dp__field(line, "run", h->run);
    dp__field(line, "prompt_text", h->prompt_text);
    dp__field(line, "date", h->date);
    dp__name(line, "token_ids");
    dp__put_ints(line, h->token_ids, h->token_count);
    dp__field_int(line, "prompt_len", h->prompt_len);
    dp__field_int(line, "steps", h->steps);
    dp__field_int(line, "seed", h->seed);
    dp__field_int(line, "sketch_size", h->sketch_size);
    dp__field(line, "payload", h->payloads ? "all" : "none");
    dp__put_engine(line, h);
    dp__put_plan(line, h);
    dp__puts(line, "}\n");
}

static const char *dp__header_fault(const dp_header *h) {
    const char *texts[10];
    size_t i;
    texts[0] = h->prompt_text, texts[1] = h->run, texts[2] = h->date, texts[3] = h->engine, texts[4] = h->version;
    texts[5] = h->model, texts[6] = h->dtype, texts[7] = h->attention, texts[8] = h->device, texts[9] = NULL;
    for (i = 0; i < 9; i++)
        if (texts[i] && !dp__is_utf8(texts[i])) return "a text of the header is not UTF-8";
    if (h->sketch_size < 1 || h->sketch_size > DP__BLOCK) return "sketch_size is not 1 to 65536";
    if (h->steps < 1 || h->prompt_len < 0 || (h->token_count && (uint64_t)h->prompt_len > h->token_count))
        return "steps is below 1, or prompt_len is negative or more than the tokens given";
    if (h->layers < 0 || h->heads < 0 || h->kv_heads < 0 || h->vocabulary < 0 || h->max_positions < 0)
        return "a count of the engine is negative";
    for (i = 0; i < h->cast_count; i++)
        if (!h->casts[i].name || !h->casts[i].value || !dp__is_utf8(h->casts[i].name) || !dp__is_utf8(h->casts[i].value))
            return "a cast without a name or dtype, or not UTF-8";
    for (i = 0; i < h->read_count; i++)
        if (!h->reads[i].arm || !h->reads[i].phase || !dp__is_utf8(h->reads[i].arm) || !dp__is_utf8(h->reads[i].phase))
            return "a read without an arm or phase, or not UTF-8";
    for (i = 0; i < h->tap_count; i++)
        if (!h->taps[i].name || !dp__is_utf8(h->taps[i].name)) return "a tap without a name, or not UTF-8";
    return NULL;
}

static char *dp__join(const char *a, const char *b) {
    char *joined = (char *)malloc(strlen(a) + strlen(b) + 1);
    if (joined) {
        memcpy(joined, a, strlen(a));
        memcpy(joined + strlen(a), b, strlen(b) + 1);
    }
    return joined;
}

static void dp__free(dp_trace *t) {
    if (!t) return;
    if (t->file) fclose(t->file);
    if (t->spool) fclose(t->spool);
    if (t->spool && t->spool_path) remove(t->spool_path);
    free(t->path), free(t->payload_path), free(t->spool_path), free(t->payload_name), free(t->prompt);
    free(t->index.data), free(t->lines.data), free(t->keys);
    DP__LOCK_END(&t->lock);
    free(t);
}

#ifdef _WIN32
#include <direct.h>
#define DP__MKDIR(path) _mkdir(path)
#else
#include <sys/stat.h>
#define DP__MKDIR(path) mkdir(path, 0777)
#endif

/* Prepare payloads/<trace>.safetensors beside the trace: its folder, and a spool that grows until the trace is closed. */
static dp_status dp__open_payloads(dp_trace *t) {
    const char *slash = strrchr(t->path, '/'), *name = slash ? slash + 1 : t->path, *dot = strrchr(name, '.');
    size_t folder = (size_t)(name - t->path), stem = dot ? (size_t)(dot - name) : strlen(name);
    char *base = (char *)malloc(folder + stem + 32);
    if (!base) return DP_NO_MEMORY;
    memcpy(base, t->path, folder);
    strcpy(base + folder, "payloads");
    if (DP__MKDIR(base) != 0 && errno != EEXIST) {
        dp__say(t->message, DP_NOT_WRITTEN, "%s: %s", base, strerror(errno));
        free(base);
        return DP_NOT_WRITTEN;
    }
    strcat(base, "/");
    strncat(base, name, stem);
    t->payload_path = dp__join(base, ".safetensors"), t->spool_path = dp__join(base, ".part");
    free(base);
    if (!t->payload_path || !t->spool_path) return DP_NO_MEMORY;
    t->payload_name = dp__join(t->payload_path + folder, "#");
    if (!t->payload_name) return DP_NO_MEMORY;
    dp__puts(&t->index, "{");
    remove(t->payload_path); /* an earlier run's numbers must not be taken for this one's */
    t->spool = fopen(t->spool_path, "w+b");
    return t->spool ? DP_OK : dp__say(t->message, DP_NOT_WRITTEN, "%s: %s", t->spool_path, strerror(errno));
}

dp_status dp_open(dp_trace **out, const char *path, const dp_header *header) {
    dp__text line;
    dp_trace *t;
    dp_status status;
    const char *fault;
    memset(&line, 0, sizeof line);
    if (!out) return DP_BAD_ARGUMENT;
    *out = NULL;
    if (!path || !header) return dp__say(dp__open_message, DP_BAD_ARGUMENT, "path or header is NULL");
    if ((fault = dp__name_fault(header->prompt)))
        return dp__say(dp__open_message, DP_BAD_ARGUMENT, "the prompt's name %s; it becomes part of file names", fault);
    if ((fault = dp__name_fault(header->mode)))
        return dp__say(dp__open_message, DP_BAD_ARGUMENT, "the mode %s; it becomes part of file names", fault);
    if ((fault = dp__header_fault(header))) return dp__say(dp__open_message, DP_BAD_ARGUMENT, "%s", fault);
    if (!(t = (dp_trace *)calloc(1, sizeof *t))) return dp__say(dp__open_message, DP_NO_MEMORY, "no memory");
    DP__LOCK_INIT(&t->lock);
    t->path = dp__join(path, ""), t->prompt = dp__join(header->prompt, "");
    t->sketch_size = header->sketch_size;
    dp__sha_init(&t->sha);
    dp__put_header(&line, header);
    status = t->path && t->prompt && !line.failed ? DP_OK : DP_NO_MEMORY;
    if (status == DP_OK && !(t->file = fopen(path, "wb")))
        status = dp__say(t->message, DP_NOT_WRITTEN, "%s: %s; make its folder first", path, strerror(errno));
    if (status == DP_OK && header->payloads) status = dp__open_payloads(t);
    if (status == DP_OK) status = dp__append(t, &line, 1);
    if (status == DP_OK) status = dp__drain(t);
    free(line.data);
    if (status != DP_OK) {
        dp__say(dp__open_message, status, "%s", t->message[0] ? t->message : "no memory");
        dp__free(t);
        return status;
    }
    *out = t;
    return DP_OK;
}

/* Find the place of a new key. Locked by the caller. 128 bits: two keys do not meet by chance. */
static dp_status dp__place(dp_trace *t, dp__digest key, size_t *place) {
    size_t i;
    if (t->key_count * 2 >= t->key_room) {
        size_t room = t->key_room ? t->key_room * 2 : 1024;
        dp__digest *grown = (dp__digest *)calloc(room, sizeof *grown);
        if (!grown) return DP_NO_MEMORY;
        for (i = 0; i < t->key_room; i++) {
            size_t at = (size_t)t->keys[i].low & (room - 1);
            if (!t->keys[i].low && !t->keys[i].high) continue;
            while (grown[at].low || grown[at].high) at = (at + 1) & (room - 1);
            grown[at] = t->keys[i];
        }
        free(t->keys);
        t->keys = grown, t->key_room = room;
    }
    for (i = (size_t)key.low & (t->key_room - 1); t->keys[i].low || t->keys[i].high; i = (i + 1) & (t->key_room - 1))
        if (t->keys[i].low == key.low && t->keys[i].high == key.high) return DP_DUPLICATE;
    *place = i;
    return DP_OK;
}

/* The record's key as text: hashed to find a second of its kind, and the name of its payload. */
static void dp__put_key(dp__text *t, const dp_key *key) {
    dp__puts(t, key->arm), dp__puts(t, "."), dp__puts(t, key->phase), dp__puts(t, ".");
    dp__put_int(t, key->step), dp__puts(t, ".");
    if (key->layer == DP_NONE) dp__puts(t, "model");
    else dp__put_int(t, key->layer);
    dp__puts(t, "."), dp__puts(t, key->tensor);
    if (key->position != DP_NONE) dp__puts(t, "."), dp__put_int(t, key->position);
}

/* The taps of the format: the first three stand outside the layers, all others in one. */
static const char *const dp__taps[] = {
    "embed",   "final_norm", "logits",   "x_in",        "attn_norm",  "q_proj",     "k_proj",    "v_proj",    "q_norm",
    "k_norm",  "q_rope",     "k_rope",   "k_cache",     "v_cache",    "attn_scores", "attn_probs", "attn_ctx", "attn_out",
    "conv_state", "ssm_state", "mixer_out", "x_mid",     "ffn_norm",   "router_logits", "expert_ids", "mlp_out", "x_out"};

static const char *dp__key_fault(const dp_key *k) {
    size_t i;
    const char *texts[3];
    if (!k) return "no key";
    texts[0] = k->arm, texts[1] = k->phase, texts[2] = k->tensor;
    for (i = 0; i < 3; i++) {
        if (!texts[i] || !*texts[i]) return "arm, phase or tensor is empty";
        if (!dp__is_utf8(texts[i])) return "arm, phase or tensor is not UTF-8";
    }
    for (i = 0; i < sizeof dp__taps / sizeof *dp__taps; i++) {
        if (strcmp(k->tensor, dp__taps[i])) continue;
        if (i < 3 && k->layer != DP_NONE) return "embed, final_norm and logits stand outside the layers: layer DP_NONE";
        if (i >= 3 && k->layer == DP_NONE) return "this tap stands in a layer: give its number";
    }
    if (k->layer != DP_NONE && k->layer < 0) return "a negative layer";
    if (k->step < 0 || k->row_start < 0) return "a negative step or row_start";
    if (k->position != DP_NONE && k->position < 0) return "a negative position";
    if (!strncmp(k->phase, "decode", 6) && k->phase[6] >= '0' && k->phase[6] <= '9' && strtoll(k->phase + 6, NULL, 10) != k->step)
        return "decodeK stands at step K";
    return NULL;
}

static int dp__is_cache(const char *tensor) { return !strcmp(tensor, "k_cache") || !strcmp(tensor, "v_cache"); }

/* The largest logits, largest first, the smaller id where two are equal; and log of the sum of all exponentials. */
static dp_status dp__put_top(dp__text *line, const dp_tensor *t, dp__room *room) {
    double values[DP__TOP], sum = 0.0, peak = -INFINITY;
    int64_t ids[DP__TOP], next = 0;
    size_t kept = 0, pass, i, j;
    for (pass = 0; pass < 2; pass++) {
        dp__cursor c = dp__cursor_of(t);
        while (c.left) {
            size_t n = c.left < DP__CHUNK ? c.left : DP__CHUNK;
            dp__to_double(dp__take(&c, n, room->bytes), t->dtype, n, room->values);
            for (i = 0; i < n; i++) {
                double v = room->values[i];
                if (pass) {
                    sum += exp(v - peak);
                    continue;
                }
                if (v > peak) peak = v;
                for (j = kept; j > 0 && v > values[j - 1]; j--)
                    if (j < DP__TOP) values[j] = values[j - 1], ids[j] = ids[j - 1];
                if (j < DP__TOP) values[j] = v, ids[j] = next;
                if (j < DP__TOP && kept < DP__TOP) kept++;
                next++;
            }
        }
    }
    dp__puts(line, ",\"top\":{\"ids\":");
    dp__put_ints(line, ids, kept);
    dp__puts(line, ",\"values\":");
    dp__put_doubles(line, values, kept);
    dp__field_double(line, "logsumexp", peak + log(sum));
    dp__puts(line, "}");
    return DP_OK;
}

static void dp__put_fingerprint(dp__text *line, const dp_tensor *t, const dp_fingerprint *f, const double *sketch, size_t m) {
    dp__field(line, "dtype", dp__dtypes[t->dtype].name);
    dp__name(line, "shape");
    dp__put_ints(line, t->shape, (size_t)t->ndim);
    dp__name(line, "hash");
    dp__put_hash(line, f->hash);
    dp__field_int(line, "nz_count", f->nz_count);
    dp__field_double(line, "abs_sum", f->abs_sum);
    dp__field_double(line, "min", f->min);
    dp__field_double(line, "max", f->max);
    dp__field_double(line, "mean", f->mean);
    dp__field_double(line, "l2", f->l2);
    dp__field_int(line, "nan_count", f->nan_count);
    dp__field_int(line, "inf_count", f->inf_count);
    dp__name(line, "sketch");
    dp__put_doubles(line, sketch, m);
}

static void dp__put_rows(dp__text *line, const dp_tensor *t, dp__room *room) {
    int64_t r;
    dp__name(line, "rows");
    dp__puts(line, "[");
    for (r = 0; r < t->shape[0]; r++) {
        if (r) dp__puts(line, ",");
        dp__put_hash(line, dp__row_hash(t, r, room));
    }
    dp__puts(line, "]");
}

/* The line of a record, all but its payload and its end. */
static void dp__put_record(dp__text *line, const dp_trace *t, const dp_key *key, const dp_tensor *tensor,
                           const dp_fingerprint *f, const double *sketch, dp__room *room) {
    dp__puts(line, "{\"type\":\"record\"");
    dp__field(line, "prompt", t->prompt);
    dp__field(line, "arm", key->arm);
    dp__field(line, "phase", key->phase);
    dp__field_int(line, "step", key->step);
    dp__name(line, "layer");
    if (key->layer == DP_NONE) dp__puts(line, "null");
    else dp__put_int(line, key->layer);
    dp__field(line, "tensor", key->tensor);
    dp__field_int(line, "token_id", key->token_id);
    dp__field_int(line, "logical_tok_idx", key->position);
    dp__field_int(line, "pos_id", key->pos_id);
    dp__put_fingerprint(line, tensor, f, sketch, (size_t)t->sketch_size);
    if (key->row_start) dp__field_int(line, "row_start", key->row_start);
    if (key->recomputed) dp__field(line, "source", "recomputed");
    if (dp__is_cache(key->tensor)) dp__put_rows(line, tensor, room);
    if (!strcmp(key->tensor, "logits") && !f->nan_count && !f->inf_count && dp__elements(tensor) > 0)
        dp__put_top(line, tensor, room);
}

/* Copy a tensor into the spool and enter it in the safetensors header; locked by the caller. */
static dp_status dp__keep(dp_trace *t, const char *name, const dp_tensor *tensor, dp__room *room) {
    size_t before = t->index.length, size = dp__dtypes[tensor->dtype].size;
    dp__cursor c = dp__cursor_of(tensor);
    uint64_t start = t->spooled, stop = start + (uint64_t)c.left * size;
    while (c.left) {
        size_t n = c.left < DP__CHUNK ? c.left : DP__CHUNK;
        const unsigned char *data = dp__take(&c, n, room->bytes);
        if (fwrite(dp__canonical(&c, data, n, room->spare), size, n, t->spool) != n)
            return t->broken = dp__say(t->message, DP_NOT_WRITTEN, "%s: %s", t->spool_path, strerror(errno));
    }
    if (before > 1) dp__puts(&t->index, ",");
    dp__put_string(&t->index, name);
    dp__puts(&t->index, ":{\"dtype\":\"");
    dp__puts(&t->index, dp__dtypes[tensor->dtype].code);
    dp__puts(&t->index, "\",\"shape\":");
    dp__put_ints(&t->index, tensor->shape, (size_t)tensor->ndim);
    dp__puts(&t->index, ",\"data_offsets\":[");
    dp__put_int(&t->index, (int64_t)start), dp__puts(&t->index, ","), dp__put_int(&t->index, (int64_t)stop);
    dp__puts(&t->index, "]}");
    if (t->index.failed) {
        t->index.failed = 0, t->index.length = before;
        return t->broken = dp__say(t->message, DP_NO_MEMORY, "no memory for the payloads' index; payloads end here");
    }
    t->spooled = stop;
    return DP_OK;
}

static dp_status dp__record(dp_trace *t, const dp_key *key, const dp_tensor *tensor) {
    dp__text line, name;
    dp__room *room = dp__new_room();
    double *sketch = (double *)malloc((size_t)t->sketch_size * sizeof *sketch);
    dp_fingerprint print;
    dp__digest digest = {0, 0};
    size_t place = 0;
    dp_status status = room && sketch ? DP_OK : DP_NO_MEMORY;
    memset(&line, 0, sizeof line), memset(&name, 0, sizeof name);
    if (status == DP_OK) {
        dp__measure(tensor, (size_t)t->sketch_size, &print, sketch, NULL, room);
        dp__put_record(&line, t, key, tensor, &print, sketch, room);
        dp__put_key(&name, key);
        dp__put(&name, "", 1);
    }
    DP__LOCK(&t->lock);
    if (status == DP_OK && (line.failed || name.failed)) status = DP_NO_MEMORY;
    if (status == DP_OK) {
        XXH128_hash_t found = XXH3_128bits(name.data, name.length);
        digest.low = found.low64 || found.high64 ? found.low64 : 1; /* zero marks a free place */
        digest.high = found.high64;
        status = t->broken != DP_OK ? t->broken : dp__place(t, digest, &place);
        if (status == DP_DUPLICATE)
            dp__say(t->message, status, "a second record of %s; a key is arm, phase, step, layer, tensor, position", name.data);
    }
    if (status == DP_OK && t->spool && (status = dp__keep(t, name.data, tensor, room)) == DP_OK) {
        char *reference = dp__join(t->payload_name, name.data);
        if (reference) dp__field(&line, "payload", reference);
        else status = DP_NO_MEMORY;
        free(reference);
    }
    if (status == DP_OK) {
        dp__puts(&line, "}\n");
        status = line.failed ? DP_NO_MEMORY : dp__append(t, &line, 1);
        if (status == DP_OK) t->records++, t->key_count++, t->keys[place] = digest; /* written, and not before */
    }
    if (status == DP_NO_MEMORY) dp__say(t->message, status, "no memory for a record, or a line of more than 64 MiB");
    DP__UNLOCK(&t->lock);
    free(line.data), free(name.data), free(sketch);
    dp__free_room(room);
    return status;
}

static dp_status dp__refuse(dp_trace *t, const char *fault) {
    DP__LOCK(&t->lock);
    dp__say(t->message, DP_BAD_ARGUMENT, "%s", fault);
    DP__UNLOCK(&t->lock);
    return DP_BAD_ARGUMENT;
}

dp_status dp_write(dp_trace *t, const dp_key *key, const dp_tensor *tensor) {
    const char *fault;
    if (!t) return DP_BAD_ARGUMENT;
    if ((fault = dp__key_fault(key)) || (fault = dp__tensor_fault(tensor))) return dp__refuse(t, fault);
    if (dp__is_cache(key->tensor) && tensor->ndim < 1) return dp__refuse(t, "a cache has one row a position: ndim 1 or more");
    if (!strcmp(key->arm, "W") || !strcmp(key->phase, "constant")) return dp__refuse(t, "constants are written by dp_constant");
    return dp__record(t, key, tensor);
}

dp_status dp_constant(dp_trace *t, int64_t layer, const char *name, const dp_tensor *tensor) {
    dp_key key = dp_make_key("W", "constant", 0, layer, name);
    const char *fault;
    if (!t) return DP_BAD_ARGUMENT;
    if ((fault = dp__key_fault(&key)) || (fault = dp__tensor_fault(tensor))) return dp__refuse(t, fault);
    if (!strchr(name, '.')) return dp__refuse(t, "a constant is called TAP.what: q_proj.weight, attn_norm.eps");
    if (!t->spool) return dp__refuse(t, "a constant is of use only with its numbers: open the trace with payloads");
    return dp__record(t, &key, tensor);
}

dp_status dp_event(dp_trace *t, const char *event, const char *arm, int64_t step, const dp_count *counts, size_t n) {
    dp__text line;
    dp_status status;
    size_t i;
    if (!t) return DP_BAD_ARGUMENT;
    if (!event || !arm || !dp__is_utf8(event) || !dp__is_utf8(arm) || step < 0)
        return dp__refuse(t, "an event without a name or arm, not UTF-8, or of a negative step");
    for (i = 0; i < n; i++)
        if (!counts[i].name || !dp__is_utf8(counts[i].name)) return dp__refuse(t, "a count without a name, or not UTF-8");
    memset(&line, 0, sizeof line);
    dp__puts(&line, "{\"type\":\"event\"");
    dp__field(&line, "event", event);
    dp__field(&line, "arm", arm);
    dp__field_int(&line, "step", step);
    dp__name(&line, "measured");
    dp__puts(&line, "{");
    for (i = 0; i < n; i++) {
        if (i) dp__puts(&line, ",");
        dp__put_string(&line, counts[i].name);
        dp__puts(&line, ":");
        dp__put_int(&line, counts[i].value);
    }
    dp__puts(&line, "}}\n");
    DP__LOCK(&t->lock);
    status = line.failed ? dp__say(t->message, DP_NO_MEMORY, "no memory for an event") : dp__append(t, &line, 1);
    t->events += status == DP_OK;
    DP__UNLOCK(&t->lock);
    free(line.data);
    return status;
}

/* Write the payload file: 8 bytes of length, the header padded to a multiple of 8, then the spool's bytes. */
static dp_status dp__close_payloads(dp_trace *t) {
    unsigned char buffer[1 << 14];
    uint64_t length;
    size_t n, i;
    char *whole = dp__join(t->payload_path, ".tmp");
    FILE *out = whole ? fopen(whole, "wb") : NULL;
    int fine;
    if (!out) {
        free(whole);
        return dp__say(t->message, DP_NOT_WRITTEN, "%s: %s", t->payload_path, strerror(errno));
    }
    dp__puts(&t->index, "}");
    while (t->index.length % 8 && !t->index.failed) dp__puts(&t->index, " ");
    length = t->index.length;
    for (i = 0; i < 8; i++) buffer[i] = (unsigned char)(length >> (8 * i));
    fine = !t->index.failed && fwrite(buffer, 1, 8, out) == 8 && fwrite(t->index.data, 1, length, out) == length;
    fine = fine && fflush(t->spool) == 0 && fseek(t->spool, 0, SEEK_SET) == 0;
    while (fine && (n = fread(buffer, 1, sizeof buffer, t->spool)) > 0) fine = fwrite(buffer, 1, n, out) == n;
    fine = fine && !ferror(t->spool);
    fine = (fclose(out) == 0) && fine;
    fine = fine && rename(whole, t->payload_path) == 0;
    free(whole);
    return fine ? DP_OK : dp__say(t->message, DP_NOT_WRITTEN, "%s: %s", t->payload_path, strerror(errno));
}

dp_status dp_close(dp_trace *t) {
    dp__text line;
    dp_status status;
    char hex[72];
    if (!t) return DP_BAD_ARGUMENT;
    memset(&line, 0, sizeof line);
    status = t->broken;
    if (status == DP_OK && t->spool) status = dp__close_payloads(t);
    if (status == DP_OK) {
        dp__sha_hex(t->sha, hex);
        dp__puts(&line, "{\"type\":\"footer\"");
        dp__field_int(&line, "records", t->records);
        dp__field_int(&line, "events", t->events);
        dp__field(&line, "sha256", hex);
        dp__puts(&line, "}\n");
        status = line.failed ? DP_NO_MEMORY : dp__append(t, &line, 0);
        if (status == DP_OK) status = dp__drain(t);
    }
    if (fclose(t->file) != 0 && status == DP_OK)
        status = dp__say(t->message, DP_NOT_WRITTEN, "%s: %s", t->path, strerror(errno));
    t->file = NULL;
    if (status != DP_OK) dp__say(dp__open_message, status, "%s", t->message[0] ? t->message : "no memory");
    free(line.data);
    dp__free(t);
    return status;
}

#if defined(__GNUC__) && defined(__cplusplus)
#pragma GCC diagnostic pop
#endif
#endif /* DRIFTPROBE_IMPLEMENTED */
#endif /* DRIFTPROBE_IMPLEMENTATION */
