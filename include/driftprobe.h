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
#if defined(__x86_64__) && defined(__GNUC__) && !defined(DRIFTPROBE_SCALAR) \
    && (!defined(_WIN32) || defined(__clang__)) /* GCC leaves the stack there at 16 bytes, too few for a vector */
#include <cpuid.h>
#include <immintrin.h>
#define DP__X86 1
#else
#define DP__X86 0
#endif

#ifdef __GNUC__
#define DP__APART __attribute__((noinline))
#else
#define DP__APART
#endif

/* ---- dtypes: the one door to double ---- */

#define DP__BLOCK 65536 /* elements of a sketch block, less what does not fill the last round of buckets */
#define DP__CHUNK 2048  /* elements that are gathered, hashed and summed while they are in cache */
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

/* Go to element `first` in C order. */
static void dp__seek(dp__cursor *c, int64_t first) {
    const dp_tensor *t = c->tensor;
    int d;
    c->left -= (size_t)first;
    for (d = t->ndim - 1; d >= 0 && c->left; d--) {
        c->index[d] = first % t->shape[d], first /= t->shape[d];
        c->at += c->index[d] * t->strides[d] * (int64_t)dp__dtypes[t->dtype].size;
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

/* Set this thread's arithmetic to the standard's, and return what it was. Models are run with subnormals taken for 0, and
 * then the same tensor would have another sketch. */
static unsigned dp__plain_arithmetic(void) {
#if DP__X86
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x1F80);
    return before;
#else
    return 0;
#endif
}

static void dp__arithmetic_again(unsigned before) {
#if DP__X86
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

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
static dp__sums dp__moments(double *x, size_t n, int64_t *nan_count, int64_t *inf_count) {
    dp__sums s = {0, 0, 0, 0, 0, 0, 0};
    size_t i;
    for (i = 0; i < n; i++) {
        double v = x[i], size = fabs(v);
        if (!(size <= DBL_MAX)) {
            if (v != v) ++*nan_count;
            else ++*inf_count;
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

/* ---- XXH3-64 of what goes by in pieces. xxhash.h's own is compiled for the oldest machine that the engine is built for;
 * inputs of more than 240 bytes, whose definition is eight sums side by side, are hashed here with what the machine has ---- */

#define DP__SHORT 240 /* bytes; up to here XXH3 has other rules, which xxhash.h keeps */

#if DP__X86
#define DP__AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define DP__AVX2 __attribute__((target("avx2,fma,f16c")))
#define DP__INLINE static inline __attribute__((always_inline))

/* Return 2 where this machine has AVX-512, 1 where it has AVX2, else 0. Compilers know F16C by name only since 2024. */
static int dp__level(void) {
    static int known = -1; /* CPUID is slow, more so in a virtual machine */
    int level = __atomic_load_n(&known, __ATOMIC_RELAXED);
    unsigned a, b, c, d;
    if (level >= 0) return level;
    __builtin_cpu_init();
    level = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
#ifndef DRIFTPROBE_NO_AVX512 /* for tests: what a machine without it does */
    if (level && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        level = 2;
#endif
    __atomic_store_n(&known, level, __ATOMIC_RELAXED);
    return level;
}

/* XXH3's own 192 bytes, in little-endian words. */
static const uint64_t dp__secret[24] = {
    UINT64_C(0xBE4BA423396CFEB8), UINT64_C(0x1CAD21F72C81017C), UINT64_C(0xDB979083E96DD4DE), UINT64_C(0x1F67B3B7A4A44072),
    UINT64_C(0x78E5C0CC4EE679CB), UINT64_C(0x2172FFCC7DD05A82), UINT64_C(0x8E2443F7744608B8), UINT64_C(0x4C263A81E69035E0),
    UINT64_C(0xCB00C391BB52283C), UINT64_C(0xA32E531B8B65D088), UINT64_C(0x4EF90DA297486471), UINT64_C(0xD8ACDEA946EF1938),
    UINT64_C(0x3F349CE33F76FAA8), UINT64_C(0x1D4F0BC7C7BBDCF9), UINT64_C(0x3159B4CD4BE0518A), UINT64_C(0x647378D9C97E9FC8),
    UINT64_C(0xC3EBD33483ACC5EA), UINT64_C(0xEB6313FAFFA081C5), UINT64_C(0x49DAF0B751DD0D17), UINT64_C(0x9E68D429265516D3),
    UINT64_C(0xFCA1477D58BE162B), UINT64_C(0xCE31D07AD1B8F88F), UINT64_C(0x280416958F3ACB45), UINT64_C(0x7E404BBBCAFBD7AF)};
#define DP__STRIPES 16 /* of 64 bytes each, between two scrambles */
#define DP__PRIME32_1 UINT64_C(0x9E3779B1)
#define DP__PRIME64_1 UINT64_C(0x9E3779B185EBCA87)

DP__INLINE DP__AVX2 __m256i dp__load256(const void *x) { return _mm256_loadu_si256((const __m256i *)x); }

/* Half a stripe, four lanes: the products of keyed halves, and the data itself, which belongs to the other lane of each
 * pair: it is swapped once, when all are added up. */
DP__INLINE DP__AVX2 void dp__half(__m256i *products, __m256i *data, const unsigned char *x, const unsigned char *secret) {
    const __m256i v = dp__load256(x), key = _mm256_xor_si256(v, dp__load256(secret));
    *products = _mm256_add_epi64(*products, _mm256_mul_epu32(key, _mm256_shuffle_epi32(key, 0xB1)));
    *data = _mm256_add_epi64(*data, v);
}

DP__INLINE DP__AVX2 void dp__stripe(__m256i *products, __m256i *data, const unsigned char *x, const unsigned char *secret) {
    dp__half(products, data, x, secret), dp__half(products + 1, data + 1, x + 32, secret + 32);
}

DP__INLINE DP__AVX2 __m256i dp__scramble(__m256i lanes, const uint64_t *secret) {
    const __m256i prime = _mm256_set1_epi64x((long long)DP__PRIME32_1);
    lanes = _mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47));
    lanes = _mm256_xor_si256(lanes, dp__load256(secret));
    return _mm256_add_epi64(_mm256_mul_epu32(lanes, prime),
                            _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(lanes, 32), prime), 32));
}

/* Add n stripes to the lanes, of which the first is number `at` in its block. */
static DP__AVX2 void dp__stripes(uint64_t *lanes, const unsigned char *x, size_t at, size_t n) {
    __m256i low = dp__load256(lanes), high = dp__load256(lanes + 4);
    while (n) {
        const unsigned char *secret = (const unsigned char *)dp__secret + 8 * at;
        const size_t take = DP__STRIPES - at < n ? DP__STRIPES - at : n;
        __m256i products[2], data[2]; /* apart from the lanes: a scramble is waited for late */
        size_t i;
        products[0] = products[1] = data[0] = data[1] = _mm256_setzero_si256();
        for (i = 0; i + 2 <= take; i += 2) {
            dp__stripe(products, data, x + 64 * i, secret + 8 * i);
            dp__stripe(products, data, x + 64 * i + 64, secret + 8 * i + 8);
        }
        if (i < take) dp__stripe(products, data, x + 64 * i, secret + 8 * i);
        low = _mm256_add_epi64(low, _mm256_add_epi64(products[0], _mm256_shuffle_epi32(data[0], 0x4E)));
        high = _mm256_add_epi64(high, _mm256_add_epi64(products[1], _mm256_shuffle_epi32(data[1], 0x4E)));
        if ((at += take) == DP__STRIPES)
            low = dp__scramble(low, dp__secret + 16), high = dp__scramble(high, dp__secret + 20), at = 0;
        x += 64 * take, n -= take;
    }
    _mm256_storeu_si256((__m256i *)lanes, low), _mm256_storeu_si256((__m256i *)(lanes + 4), high);
}

static void dp__begin_lanes(uint64_t *lanes) {
    static const uint64_t start[8] = {UINT64_C(0xC2B2AE3D),         DP__PRIME64_1,
                                      UINT64_C(0xC2B2AE3D27D4EB4F), UINT64_C(0x165667B19E3779F9),
                                      UINT64_C(0x85EBCA77C2B2AE63), UINT64_C(0x85EBCA77),
                                      UINT64_C(0x27D4EB2F165667C5), DP__PRIME32_1};
    memcpy(lanes, start, sizeof start);
}

/* The last stripe is the input's last 64 bytes, whatever of them was in the one before; then the lanes become one. */
static uint64_t dp__end_lanes(uint64_t *lanes, const unsigned char *last, uint64_t length) {
    __extension__ typedef unsigned __int128 wide;
    const unsigned char *secret = (const unsigned char *)dp__secret;
    uint64_t hash = length * DP__PRIME64_1, key[8];
    int i;
    memcpy(key, secret + 121, 64);
    for (i = 0; i < 8; i++) {
        uint64_t v;
        memcpy(&v, last + 8 * i, 8);
        lanes[i ^ 1] += v, key[i] ^= v;
        lanes[i] += (key[i] & 0xFFFFFFFF) * (key[i] >> 32);
    }
    memcpy(key, secret + 11, 64);
    for (i = 0; i < 8; i += 2) {
        wide product = (wide)(lanes[i] ^ key[i]) * (lanes[i + 1] ^ key[i + 1]);
        hash += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    hash = (hash ^ hash >> 37) * UINT64_C(0x165667919E3779F9);
    return hash ^ hash >> 32;
}
#else
static int dp__level(void) { return 0; }
#endif

/* A hash that is begun. The length is known before, so that each stripe is added where it lies, and none is kept back. */
typedef struct dp__hasher {
    uint64_t lanes[8], length, seen;
    int level;
    unsigned char kept[DP__SHORT]; /* a whole short input; of a long one the last 64 bytes, then the stripe that is begun */
    XXH3_state_t *state;           /* xxhash.h's, for long inputs where there are no vectors */
} dp__hasher;

static int dp__new_hasher(dp__hasher *h) {
    h->level = dp__level();
    h->state = h->level ? NULL : XXH3_createState();
    return h->level || h->state;
}

static void dp__hash_begin(dp__hasher *h, uint64_t length) {
    h->length = length, h->seen = 0;
    if (length <= DP__SHORT) return;
#if DP__X86
    if (h->level) dp__begin_lanes(h->lanes);
#endif
    if (!h->level) XXH3_64bits_reset(h->state);
}

#if DP__X86
static void dp__hash_long(dp__hasher *h, const unsigned char *x, size_t n) {
    unsigned char *last = h->kept, *begun = h->kept + 64;
    const uint64_t stripes = (h->length - 1) / 64; /* all but the last */
    if (n >= 64) memcpy(last, x + n - 64, 64);
    else memmove(last, last + n, 64 - n), memcpy(last + 64 - n, x, n);
    if (h->seen % 64) {
        size_t filled = (size_t)(h->seen % 64), part = 64 - filled < n ? 64 - filled : n;
        memcpy(begun + filled, x, part);
        h->seen += part, x += part, n -= part;
        if (h->seen % 64 == 0 && h->seen / 64 <= stripes)
            dp__stripes(h->lanes, begun, (size_t)(h->seen / 64 - 1) % DP__STRIPES, 1);
    }
    if (n) {
        uint64_t at = h->seen / 64, whole = n / 64 < stripes - at ? n / 64 : stripes - at;
        dp__stripes(h->lanes, x, (size_t)(at % DP__STRIPES), (size_t)whole);
        memcpy(begun, x + n / 64 * 64, n % 64);
        h->seen += n;
    }
}
#endif

/* Add the next n bytes; in all no more than were announced. */
static void dp__hash_add(dp__hasher *h, const unsigned char *x, size_t n) {
    if (h->length <= DP__SHORT) {
        memcpy(h->kept + h->seen, x, n);
        h->seen += n;
        return;
    }
#if DP__X86
    if (h->level) dp__hash_long(h, x, n);
#endif
    if (!h->level) XXH3_64bits_update(h->state, x, n), h->seen += n;
}

static uint64_t dp__hash_end(dp__hasher *h) {
    if (h->length <= DP__SHORT) return XXH3_64bits(h->kept, (size_t)h->length);
#if DP__X86
    if (h->level) return dp__end_lanes(h->lanes, h->kept, h->length);
#endif
    return XXH3_64bits_digest(h->state);
}

/* ---- room for what a pass needs ---- */

typedef struct dp__room {
    dp__hasher whole, row;
    unsigned char *bytes; /* of a chunk, where it had to be gathered */
    double *values;       /* of a chunk, or its floats, or its canonical bytes */
    double *sums;         /* of a sketch block */
    uint64_t *signs;      /* of the 65536 elements around, where they are not kept for all */
} dp__room;

/* Room for tensors of so many elements and sketches of so many sums. What is not used is not touched: that is free. */
static dp__room *dp__new_room(int64_t elements, size_t sums) {
    const size_t n = elements > DP__CHUNK ? DP__CHUNK : (size_t)(elements > 0 ? elements : 1);
    dp__room *room = (dp__room *)malloc(sizeof *room + 64 + (2 * n + sums + DP__BLOCK / 64) * 8);
    if (!room) return NULL;
    room->values = (double *)(((uintptr_t)(room + 1) + 63) & ~(uintptr_t)63); /* where a cache line begins */
    room->bytes = (unsigned char *)(room->values + n);
    room->sums = room->values + 2 * n;
    room->signs = (uint64_t *)(void *)(room->sums + sums);
    room->row.state = NULL;
    if (dp__new_hasher(&room->whole) && dp__new_hasher(&room->row)) return room;
    if (room->whole.state) XXH3_freeState(room->whole.state);
    free(room);
    return NULL;
}

static void dp__free_room(dp__room *room) {
    if (room && room->whole.state) XXH3_freeState(room->whole.state);
    if (room && room->row.state) XXH3_freeState(room->row.state);
    free(room);
}

/* ---- moments and sketch in vectors: whole rounds of 64 buckets, finite elements only ---- */

#if DP__X86
/* What four buckets' signs, as bits, multiply by. A product with 1 or -1 is exact, so that adding it is adding +x or -x. */
static const double dp__turns[16][4] __attribute__((aligned(64))) = {
    {1, 1, 1, 1}, {-1, 1, 1, 1}, {1, -1, 1, 1}, {-1, -1, 1, 1},
    {1, 1, -1, 1}, {-1, 1, -1, 1}, {1, -1, -1, 1}, {-1, -1, -1, 1},
    {1, 1, 1, -1}, {-1, 1, 1, -1}, {1, -1, 1, -1}, {-1, -1, 1, -1},
    {1, 1, -1, -1}, {-1, 1, -1, -1}, {1, -1, -1, -1}, {-1, -1, -1, -1}};

typedef struct dp__sums256 {
    __m256d sum[4], abs[4], squares[4]; /* four of each: one addition need not wait for the one before */
    __m256 min, max;
    __m256i zeros;
} dp__sums256;

DP__INLINE DP__AVX2 void dp__extremes(dp__sums256 *a, const float *x) {
    const __m256 v = _mm256_loadu_ps(x);
    a->min = _mm256_min_ps(a->min, v), a->max = _mm256_max_ps(a->max, v);
    a->zeros = _mm256_sub_epi32(a->zeros, _mm256_castps_si256(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_EQ_OQ)));
}

/* Four floats, the ones of `bucket`; `sign` is the offset of their signs in dp__turns, `which` is 0 to 3. */
DP__INLINE DP__AVX2 void dp__four(dp__sums256 *a, __m256d *bucket, const float *x, size_t sign, int which) {
    const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(x)), size = _mm256_andnot_pd(_mm256_set1_pd(-0.0), v);
    const double *turn = (const double *)(const void *)((const char *)dp__turns + sign);
    *bucket = _mm256_fmadd_pd(v, _mm256_load_pd(turn), *bucket);
    a->sum[which] = _mm256_add_pd(a->sum[which], v);
    a->abs[which] = _mm256_fmadd_pd(size, _mm256_set1_pd(1.0), a->abs[which]); /* the units that add are the busier */
    a->squares[which] = _mm256_fmadd_pd(v, v, a->squares[which]);
}

/* Columns of 8 or 16 buckets, one after the other: so few running sums stay in registers. `now` has all 64. */
DP__INLINE DP__AVX2 void dp__columns(dp__sums256 *a, const float *x, size_t n, const uint64_t *signs, double *now,
                                     const int columns) {
    int g;
    for (g = 0; g < 64; g += columns) {
        const unsigned char *bits = (const unsigned char *)signs + g / 8;
        const float *at = x + g, *end = x + n;
        __m256d first = _mm256_loadu_pd(now + g), second = _mm256_loadu_pd(now + g + 4), third = first, fourth = first;
        if (columns == 16) third = _mm256_loadu_pd(now + g + 8), fourth = _mm256_loadu_pd(now + g + 12);
        for (; at < end; at += 64, bits += 8) {
            const size_t sign = columns == 16 ? (size_t)bits[0] | (size_t)bits[1] << 8 : (size_t)bits[0];
            dp__extremes(a, at);
            dp__four(a, &first, at, sign << 5 & 480, 0), dp__four(a, &second, at + 4, sign << 1 & 480, 1);
            if (columns == 8) continue;
            dp__extremes(a, at + 8);
            dp__four(a, &third, at + 8, sign >> 3 & 480, 2), dp__four(a, &fourth, at + 12, sign >> 7 & 480, 3);
        }
        _mm256_storeu_pd(now + g, first), _mm256_storeu_pd(now + g + 4, second);
        if (columns == 16) _mm256_storeu_pd(now + g + 8, third), _mm256_storeu_pd(now + g + 12, fourth);
    }
}

DP__INLINE DP__AVX2 double dp__sum_of(const __m256d *v) {
    double lane[4];
    _mm256_storeu_pd(lane, _mm256_add_pd(_mm256_add_pd(v[0], v[1]), _mm256_add_pd(v[2], v[3])));
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

/* Add up n floats (a multiple of 64) of which the first goes to bucket 0. Returns 0, with nothing done, where one is NaN
 * or infinite: then the sum of sizes is, and else never. */
DP__INLINE DP__AVX2 int dp__rounds(const float *x, size_t n, const uint64_t *signs, double *sums, dp__sums *s, const int columns) {
    dp__sums256 a;
    double now[64];
    float low[8], high[8];
    int32_t zeros[8];
    int i;
    memset(&a, 0, sizeof a), memcpy(now, sums, sizeof now);
    a.min = _mm256_set1_ps(INFINITY), a.max = _mm256_set1_ps(-INFINITY);
    dp__columns(&a, x, n, signs, now, columns);
    s->abs_sum = dp__sum_of(a.abs);
    if (!(s->abs_sum <= DBL_MAX)) return 0;
    s->sum = dp__sum_of(a.sum), s->squares = dp__sum_of(a.squares);
    _mm256_storeu_ps(low, a.min), _mm256_storeu_ps(high, a.max), _mm256_storeu_si256((__m256i *)zeros, a.zeros);
    s->min = (double)low[0], s->max = (double)high[0], s->nz = s->finite = (int64_t)n;
    for (i = 0; i < 8; i++) {
        s->nz -= zeros[i];
        s->min = (double)low[i] < s->min ? (double)low[i] : s->min;
        s->max = (double)high[i] > s->max ? (double)high[i] : s->max;
    }
    memcpy(sums, now, sizeof now);
    return 1;
}

static DP__AVX2 int dp__rounds256(const float *x, size_t n, const uint64_t *signs, double *sums, dp__sums *s) {
    return dp__rounds(x, n, signs, sums, s, 8);
}

static DP__AVX512 int dp__rounds512(const float *x, size_t n, const uint64_t *signs, double *sums, dp__sums *s) {
    return dp__rounds(x, n, signs, sums, s, 16); /* with the registers that AVX-512 has more of */
}

/* Eight of e4m3fn: as float16 with the exponent's bias 8 less, and all ones made its NaN. */
DP__INLINE DP__AVX2 __m256 dp__eight_e4m3fn(__m128i small) {
    const __m128i wide = _mm_cvtepu8_epi16(small), size = _mm_and_si128(wide, _mm_set1_epi16(0x7F));
    const __m128i sign = _mm_slli_epi16(_mm_andnot_si128(_mm_set1_epi16(0x7F), wide), 8);
    const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(size, _mm_set1_epi16(0x7F)), _mm_set1_epi16(0x7E00));
    const __m128i half = _mm_or_si128(_mm_or_si128(sign, _mm_slli_epi16(size, 7)), nan);
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

/* Eight elements of a dtype whose every value is a float's. */
DP__INLINE DP__AVX2 __m256 dp__eight(const unsigned char *x, const int dtype) {
    const __m128i small = dp__dtypes[dtype].size == 1 ? _mm_loadl_epi64((const __m128i *)(const void *)x)
                                                      : _mm_loadu_si128((const __m128i *)(const void *)x);
    if (dtype == DP_FLOAT16) return _mm256_cvtph_ps(small);
    if (dtype == DP_FLOAT8_E5M2) return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(small), 8)); /* its upper half */
    if (dtype == DP_FLOAT8_E4M3FN) return dp__eight_e4m3fn(small);
    if (dtype == DP_BOOL) return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_min_epu8(small, _mm_set1_epi8(1))));
    if (dtype == DP_INT16) return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(small));
    if (dtype == DP_INT8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(small));
    if (dtype == DP_UINT8) return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(small));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(small), 16)); /* bfloat16 */
}

DP__INLINE DP__AVX2 void dp__eights(const unsigned char *x, size_t n, float *out, const int dtype) {
    size_t i;
    for (i = 0; i < n; i += 8) _mm256_storeu_ps(out + i, dp__eight(x + i * dp__dtypes[dtype].size, dtype));
}

/* Sixteen bfloat16 at a time: each becomes the upper half of a float, beside a lower half of zeros. */
DP__INLINE DP__AVX2 void dp__from_bfloat16(const unsigned char *x, size_t n, float *out) {
    const __m256i none = _mm256_setzero_si256();
    size_t i;
    for (i = 0; i < n; i += 16) {
        const __m256i v = dp__load256(x + 2 * i), even = _mm256_unpacklo_epi16(none, v), odd = _mm256_unpackhi_epi16(none, v);
        _mm256_storeu_si256((__m256i *)(void *)(out + i), _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256((__m256i *)(void *)(out + i + 8), _mm256_permute2x128_si256(even, odd, 0x31));
    }
}

/* n elements (a multiple of 64) as floats: where they lie, or in `room`; NULL where not every value is a float's. */
static DP__AVX2 const float *dp__floats(const unsigned char *x, int dtype, size_t n, float *room) {
    switch (dtype) {
    case DP_FLOAT32: return (const float *)(const void *)x;
    case DP_FLOAT16: dp__eights(x, n, room, DP_FLOAT16); break;
    case DP_BFLOAT16: dp__from_bfloat16(x, n, room); break;
    case DP_FLOAT8_E5M2: dp__eights(x, n, room, DP_FLOAT8_E5M2); break;
    case DP_FLOAT8_E4M3FN: dp__eights(x, n, room, DP_FLOAT8_E4M3FN); break;
    case DP_BOOL: dp__eights(x, n, room, DP_BOOL); break;
    case DP_INT16: dp__eights(x, n, room, DP_INT16); break;
    case DP_INT8: dp__eights(x, n, room, DP_INT8); break;
    case DP_UINT8: dp__eights(x, n, room, DP_UINT8); break;
    default: return NULL;
    }
    return room;
}

/* Compute a chunk in vectors, if this machine, this dtype and this chunk allow it; else return 0, with nothing done. */
static int dp__in_vectors(const unsigned char *data, int dtype, size_t n, dp__sketcher *s, dp__sums *part, double *room) {
    const size_t at = (size_t)(s->next % DP__BLOCK);
    const int level = dp__level();
    const float *x;
    if (!level || s->size != 64 || n % 64 || at % 64 || !n) return 0;
    if (!(x = dp__floats(data, dtype, n, (float *)(void *)room))) return 0;
    if (at == 0) s->signs = dp__signs(s->next / DP__BLOCK, s->own);
    if (!(level == 2 ? dp__rounds512 : dp__rounds256)(x, n, s->signs + at / 64, s->sums, part)) return 0;
    s->next += n;
    if ((s->filled += n) == s->block) dp__end_block(s);
    return 1;
}
#else
static int dp__in_vectors(const unsigned char *data, int dtype, size_t n, dp__sketcher *s, dp__sums *part, double *room) {
    (void)data, (void)dtype, (void)n, (void)s, (void)part, (void)room;
    return 0;
}
#endif

/* The hashes of a tensor's rows, of `bytes` each, taken from its canonical bytes as they go by. */
typedef struct dp__rows {
    uint64_t *hashes;
    size_t bytes;
    dp__hasher *hasher; /* of the row that is begun */
} dp__rows;

static void dp__hash_rows(dp__rows *r, const unsigned char *data, size_t n) {
    dp__hasher *h = r->hasher;
    while (n) {
        size_t left = r->bytes - (size_t)h->seen, part = left < n ? left : n;
        if (part == r->bytes && part <= DP__SHORT) {
            *r->hashes++ = XXH3_64bits(data, part);
        } else {
            if (!h->seen) dp__hash_begin(h, r->bytes);
            dp__hash_add(h, data, part);
            if (part == left) *r->hashes++ = dp__hash_end(h), h->seen = 0;
        }
        data += part, n -= part;
    }
}

/* What is known of a tensor up to an element. Passes over parts of it, each whole blocks, give the same as one pass. */
typedef struct dp__pass {
    dp__cursor cursor;
    dp__sketcher sketch;
    dp__sums sums;
    int64_t nan_count, inf_count;
    dp__room *room;
} dp__pass;

/* From element `first`, which begins a sketch block; `totals` are written. */
static dp__pass dp__begin_pass(const dp_tensor *t, int64_t first, size_t size, double *totals, dp__room *room) {
    dp__pass p;
    size_t b;
    memset(&p, 0, sizeof p);
    p.cursor = dp__cursor_of(t), p.room = room;
    dp__seek(&p.cursor, first);
    p.sketch.sums = room->sums, p.sketch.totals = totals, p.sketch.own = room->signs;
    p.sketch.size = size, p.sketch.block = DP__BLOCK / size * size, p.sketch.next = (uint64_t)first;
    for (b = 0; b < size; b++) totals[b] = room->sums[b] = 0.0;
    return p;
}

/* Add a chunk, whole rounds in vectors where that can be, to `block`. */
static void dp__sum_chunk(dp__pass *p, const unsigned char *data, size_t n, dp__sums *block) {
    const int dtype = p->cursor.tensor->dtype;
    const size_t whole = n / 64 * 64;
    dp__sums part = {0, 0, 0, 0, 0, 0, 0};
    if (dp__in_vectors(data, dtype, whole, &p->sketch, &part, p->room->values)) {
        dp__pool(block, &part);
        data += whole * dp__dtypes[dtype].size, n -= whole;
    }
    if (!n) return;
    dp__to_double(data, dtype, n, p->room->values);
    part = dp__moments(p->room->values, n, &p->nan_count, &p->inf_count);
    dp__pool(block, &part);
    dp__sketch(&p->sketch, p->room->values, n);
}

#define DP__HASH 1
#define DP__SUM 2

/* Pass over the next 65536 elements, or what there is, and do what is asked for with each chunk while it is in cache. */
static void dp__pass_block(dp__pass *p, int what, dp__hasher *whole, dp__rows *rows) {
    const size_t size = dp__dtypes[p->cursor.tensor->dtype].size;
    size_t left = p->cursor.left < DP__BLOCK ? p->cursor.left : DP__BLOCK, n;
    dp__sums block = {0, 0, 0, 0, 0, 0, 0};
    for (; left; left -= n) {
        const unsigned char *data, *canonical;
        n = left < DP__CHUNK ? left : DP__CHUNK;
        data = dp__take(&p->cursor, n, p->room->bytes);
        if (what & DP__HASH) {
            canonical = dp__canonical(&p->cursor, data, n, (unsigned char *)p->room->values);
            dp__hash_add(whole, canonical, n * size);
            if (rows) dp__hash_rows(rows, canonical, n * size);
        }
        if (what & DP__SUM) dp__sum_chunk(p, data, n, &block);
    }
    dp__pool(&p->sums, &block);
}

/* What the sums of a whole tensor come to. */
static void dp__conclude(const dp_tensor *t, const dp__pass *p, uint64_t hash, dp_fingerprint *f) {
    const dp__sums *all = &p->sums;
    double top = fabs(all->min) > fabs(all->max) ? fabs(all->min) : fabs(all->max);
    int overflowed;
    f->hash = hash, f->nan_count = p->nan_count, f->inf_count = p->inf_count;
    f->nz_count = all->nz, f->min = all->min + 0.0, f->max = all->max + 0.0; /* whichever zero a vector found, it is 0 */
    f->abs_sum = dp__saturate(all->abs_sum);
    f->mean = all->finite ? all->sum / (double)all->finite : 0.0;
    f->l2 = sqrt(all->squares);
    overflowed = !(fabs(f->mean) <= DBL_MAX);
    if (top > 0 && (overflowed || top <= 1e-100 || top >= 1e100))
        dp__scaled_moments(t, top, all->finite, p->room->values, p->room->bytes, f, overflowed);
}

/* A function of its own, so that no sum is moved to before the arithmetic is set. */
static DP__APART void dp__measure_plainly(const dp_tensor *t, size_t size, dp_fingerprint *f, double *sketch, dp__rows *rows,
                                          dp__room *room) {
    dp__pass p = dp__begin_pass(t, 0, size, sketch, room);
    dp__hash_begin(&room->whole, (uint64_t)p.cursor.left * dp__dtypes[t->dtype].size);
    while (p.cursor.left) dp__pass_block(&p, DP__HASH | DP__SUM, &room->whole, rows);
    if (p.sketch.filled) dp__end_block(&p.sketch);
    dp__conclude(t, &p, dp__hash_end(&room->whole), f);
}

/* Pass over a tensor once: hash, moments, sketch, and `rows` where they are asked for. */
static void dp__measure(const dp_tensor *t, size_t size, dp_fingerprint *f, double *sketch, dp__rows *rows, dp__room *room) {
    const unsigned mode = dp__plain_arithmetic();
    dp__measure_plainly(t, size, f, sketch, rows, room);
    dp__arithmetic_again(mode);
}

/* The hash of row r of the first axis. */
static uint64_t dp__row_hash(const dp_tensor *t, int64_t r, dp__room *room) {
    const size_t size = dp__dtypes[t->dtype].size;
    dp_tensor row = *t;
    dp__cursor c;
    row.shape[0] = 1;
    row.data = (const unsigned char *)t->data + r * t->strides[0] * (int64_t)size;
    c = dp__cursor_of(&row);
    dp__hash_begin(&room->row, (uint64_t)c.left * size);
    while (c.left) {
        size_t n = c.left < DP__CHUNK ? c.left : DP__CHUNK;
        const unsigned char *data = dp__take(&c, n, room->bytes);
        dp__hash_add(&room->row, dp__canonical(&c, data, n, (unsigned char *)room->values), n * size);
    }
    return dp__hash_end(&room->row);
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
    if (!(room = dp__new_room(dp__elements(tensor), sketch_size))) return DP_NO_MEMORY;
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
        if (fwrite(dp__canonical(&c, data, n, (unsigned char *)room->values), size, n, t->spool) != n)
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
    dp__room *room = dp__new_room(dp__elements(tensor), (size_t)t->sketch_size);
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
