/* A small Llama in C with its own KV cache, that writes driftprobe traces: what to copy from for your own engine.
 *
 *     llama --model DIR --tokens FILE --prompt NAME --prompt-len N [--steps K] [--mode MODE] [--arm ARM] [--seed S]
 *           [--layers all|0,1,...] [--bug NAME] --out TRACE
 *
 * DIR holds config.json and model.safetensors (float32, as Hugging Face writes a LlamaForCausalLM). FILE holds token ids,
 * separated by blanks: the prompt, what follows it, and enough behind that for the longest arm. TRACE is one .jsonl file.
 *
 * It has two ways to compute a token, as real engines do. `prefill` takes many tokens at once, with loops that keep a
 * weight row in cache over all of them; `decode` takes one, with loops that stream the weights. Both sum in another order,
 * so they never agree to the bit. --bug plants a fault into decode, for driftprobe to find: see `bugs` below.
 *
 * What is driftprobe's is marked "probe:". The rest is any engine.
 *
 * Axes: T tokens of a call, C channels, H query heads, G key/value heads, D head dimension, S cache rows, V vocabulary.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define DRIFTPROBE_IMPLEMENTATION
#include "driftprobe.h" /* probe: one source file has the implementation */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(const char *what, const char *where, const char *next) {
    fprintf(stderr, "error: %s\n  where: %s\n  next:  %s\n", what, where, next);
    exit(2);
}

static void *room(size_t count, size_t size) {
    void *made = calloc(count ? count : 1, size);
    if (!made) die("out of memory", "llama", "use a smaller model or a shorter prompt");
    return made;
}

/* ---- model: config.json and model.safetensors ---- */

typedef struct {
    int layers, channels, heads, kv_heads, dim, hidden, vocabulary, positions;
    float eps, theta;
} config;

typedef struct {
    const float *attn_norm, *q, *k, *v, *o, *ffn_norm, *gate, *up, *down;
} layer_weights;

typedef struct {
    config c;
    const float *embed, *final_norm, *head;
    layer_weights *layer;
    char *file, *index; /* model.safetensors: its JSON header, and the bytes behind it */
} model;

static char *read_file(const char *folder, const char *name, size_t *size) {
    char path[4096];
    FILE *f;
    char *data;
    long n;
    snprintf(path, sizeof path, "%s%s%s", folder, *folder ? "/" : "", name);
    if (!(f = fopen(path, "rb"))) die("cannot open a file", path, "check the path");
    fseek(f, 0, SEEK_END), n = ftell(f), rewind(f);
    data = room((size_t)n + 1, 1);
    if (fread(data, 1, (size_t)n, f) != (size_t)n) die("cannot read a file", path, "copy it again");
    fclose(f);
    *size = (size_t)n;
    return data;
}

static double number_of(const char *json, const char *key, double otherwise) {
    char quoted[64];
    const char *at;
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    if (!(at = strstr(json, quoted)) || !(at = strchr(at + strlen(quoted), ':'))) return otherwise;
    at += strspn(at, ": \t\n");
    return strchr("-0123456789", *at) ? strtod(at, NULL) : otherwise;
}

static const float *weight(const model *m, const char *name, size_t count) {
    char quoted[128];
    const char *at, *offsets;
    unsigned long long start, stop;
    snprintf(quoted, sizeof quoted, "\"%s\":{", name);
    at = strstr(m->index, quoted);
    offsets = at ? strstr(at, "\"data_offsets\":[") : NULL;
    if (!offsets || sscanf(offsets, "\"data_offsets\":[%llu,%llu]", &start, &stop) != 2)
        die("weight not found in model.safetensors", name, "give a Llama model without biases");
    if (!strstr(at, "\"dtype\":\"F32\"") || strstr(at, "\"dtype\":\"F32\"") > strchr(at, '}') || stop - start != count * 4)
        die("weight of another dtype or size", name, "convert the model to float32");
    return (const float *)(m->file + start);
}

static const float *layer_weight(const model *m, int layer, const char *name, size_t count) {
    char whole[128];
    snprintf(whole, sizeof whole, "model.layers.%d.%s.weight", layer, name);
    return weight(m, whole, count);
}

static model load(const char *folder) {
    model m;
    size_t size, index_size = 0, i, C, kv;
    char *json = read_file(folder, "config.json", &size), *file = read_file(folder, "model.safetensors", &size);
    config *c = &m.c;
    c->layers = (int)number_of(json, "num_hidden_layers", 0), c->channels = (int)number_of(json, "hidden_size", 0);
    c->heads = (int)number_of(json, "num_attention_heads", 1);
    c->kv_heads = (int)number_of(json, "num_key_value_heads", c->heads);
    c->dim = (int)number_of(json, "head_dim", c->channels / c->heads);
    c->hidden = (int)number_of(json, "intermediate_size", 0), c->vocabulary = (int)number_of(json, "vocab_size", 0);
    c->positions = (int)number_of(json, "max_position_embeddings", 2048);
    c->eps = (float)number_of(json, "rms_norm_eps", 1e-6), c->theta = (float)number_of(json, "rope_theta", 10000.0);
    free(json);
    for (i = 8; i-- > 0;) index_size = index_size << 8 | (unsigned char)file[i];
    if (size < 8 || index_size > size - 8) die("not a safetensors file", "model.safetensors", "copy the model again");
    m.index = room(index_size + 1, 1);
    memcpy(m.index, file + 8, index_size);
    m.file = file + 8 + index_size;
    C = (size_t)c->channels, kv = (size_t)c->kv_heads * (size_t)c->dim;
    m.embed = weight(&m, "model.embed_tokens.weight", (size_t)c->vocabulary * C);
    m.final_norm = weight(&m, "model.norm.weight", C);
    m.head = strstr(m.index, "\"lm_head.weight\"") ? weight(&m, "lm_head.weight", (size_t)c->vocabulary * C) : m.embed;
    m.layer = room((size_t)c->layers, sizeof *m.layer);
    for (i = 0; i < (size_t)c->layers; i++) {
        layer_weights *w = &m.layer[i];
        size_t q = (size_t)c->heads * (size_t)c->dim, hidden = (size_t)c->hidden;
        w->attn_norm = layer_weight(&m, (int)i, "input_layernorm", C);
        w->q = layer_weight(&m, (int)i, "self_attn.q_proj", q * C);
        w->k = layer_weight(&m, (int)i, "self_attn.k_proj", kv * C);
        w->v = layer_weight(&m, (int)i, "self_attn.v_proj", kv * C);
        w->o = layer_weight(&m, (int)i, "self_attn.o_proj", C * q);
        w->ffn_norm = layer_weight(&m, (int)i, "post_attention_layernorm", C);
        w->gate = layer_weight(&m, (int)i, "mlp.gate_proj", hidden * C);
        w->up = layer_weight(&m, (int)i, "mlp.up_proj", hidden * C);
        w->down = layer_weight(&m, (int)i, "mlp.down_proj", C * hidden);
    }
    return m;
}

/* ---- the KV cache: per layer [S, G, D] ---- */

typedef struct {
    float **k, **v;
    int rows, room;
} cache;

static cache new_cache(const config *c, int rows) {
    cache made;
    int l;
    size_t row = (size_t)c->kv_heads * (size_t)c->dim;
    made.k = room((size_t)c->layers, sizeof *made.k), made.v = room((size_t)c->layers, sizeof *made.v);
    made.rows = 0, made.room = rows;
    for (l = 0; l < c->layers; l++)
        made.k[l] = room((size_t)rows * row, sizeof(float)), made.v[l] = room((size_t)rows * row, sizeof(float));
    return made;
}

static void free_cache(const config *c, cache *kv) {
    int l;
    for (l = 0; l < c->layers; l++) free(kv->k[l]), free(kv->v[l]);
    free(kv->k), free(kv->v);
}

/* ---- bugs, for driftprobe to find: each sits in the decode path only ---- */

typedef enum { NO_BUG, ROPE_POSITION, WRONG_SLOT, GQA_TILE, MISSING_SCALE } bug;
static const struct {
    const char *name, *about;
} bugs[] = {{"none", "decode as it should be"},
            {"rope_position", "the query is rotated for the position before its own"},
            {"wrong_slot", "the newest key and value overwrite the row before theirs"},
            {"gqa_tile", "query head h reads key/value head h mod G, not h / (H/G)"},
            {"missing_scale", "scores are not divided by the square root of D"}};

/* ---- probe: what is being recorded ---- */

typedef struct {
    dp_trace *trace; /* NULL: nothing */
    const char *arm;
    char phase[32];
    int step, first, last; /* positions to record: reads of step `step` + 0, 1, ... */
    const char *layers;    /* one character a layer: '1' where it is recorded */
    const int *tokens;
} probe;

/* Record rows of a call's tensor [T, heads, dim] (heads 0: [T, dim]) for every position that is asked for. */
static void tap(const probe *p, int layer, const char *name, const float *data, int start, int count, int heads, int dim) {
    int position;
    if (!p->trace || (layer >= 0 && p->layers[layer] != '1')) return;
    for (position = start; position < start + count; position++) {
        int64_t shape[3];
        size_t row = (size_t)(heads ? heads : 1) * (size_t)dim;
        dp_key key;
        dp_tensor t;
        if (position < p->first || position > p->last) continue;
        key = dp_make_key(p->arm, p->phase, p->step + position - p->first, layer < 0 ? DP_NONE : layer, name);
        key.token_id = p->tokens[position], key.position = key.pos_id = position;
        shape[0] = 1, shape[1] = heads ? heads : dim, shape[2] = dim;
        t = dp_make_tensor(data + (size_t)(position - start) * row, DP_FLOAT32, heads ? 3 : 2, shape);
        if (dp_write(p->trace, &key, &t) != DP_OK) die("the trace was not written", dp_message(p->trace), "see above");
    }
}

/* Record the cache rows that the token at each position sees. */
static void tap_cache(const probe *p, int layer, const char *name, const float *rows, int start, int count, int G, int D) {
    int position;
    if (!p->trace || p->layers[layer] != '1') return;
    for (position = start; position < start + count; position++) {
        int64_t shape[3];
        dp_key key;
        dp_tensor t;
        if (position < p->first || position > p->last) continue;
        key = dp_make_key(p->arm, p->phase, p->step + position - p->first, layer, name);
        key.token_id = p->tokens[position], key.position = key.pos_id = position;
        shape[0] = position + 1, shape[1] = G, shape[2] = D;
        t = dp_make_tensor(rows, DP_FLOAT32, 3, shape);
        if (dp_write(p->trace, &key, &t) != DP_OK) die("the trace was not written", dp_message(p->trace), "see above");
    }
}

/* ---- the ops ---- */

static void rms_norm(const float *x, const float *w, float eps, int n, float *out) {
    float squares = 0.0f, scale;
    int i;
    for (i = 0; i < n; i++) squares += x[i] * x[i];
    scale = 1.0f / sqrtf(squares / (float)n + eps);
    for (i = 0; i < n; i++) out[i] = x[i] * scale * w[i];
}

/* out[T, rows] = x[T, n] w[rows, n]^T: a weight row stays in cache over all tokens; sums run from left to right. */
static void matmul(const float *x, const float *w, int T, int rows, int n, float *out) {
    int r, t, i;
    for (r = 0; r < rows; r++)
        for (t = 0; t < T; t++) {
            float sum = 0.0f;
            for (i = 0; i < n; i++) sum += x[t * n + i] * w[(size_t)r * (size_t)n + (size_t)i];
            out[t * rows + r] = sum;
        }
}

/* out[rows] = w[rows, n] x[n]: eight sums side by side, as vector units have them. */
static void matvec(const float *x, const float *w, int rows, int n, float *out) {
    int r, i, j;
    for (r = 0; r < rows; r++) {
        float lane[8] = {0};
        const float *row = w + (size_t)r * (size_t)n;
        for (i = 0; i + 8 <= n; i += 8)
            for (j = 0; j < 8; j++) lane[j] += x[i + j] * row[i + j];
        for (; i < n; i++) lane[0] += x[i] * row[i];
        out[r] = ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
    }
}

/* Rotate heads [count, D] for a position; dimension i goes with i + D/2. */
static void rope(float *x, int count, int D, int position, float theta) {
    int h, i;
    for (h = 0; h < count; h++)
        for (i = 0; i < D / 2; i++) {
            float angle = (float)position * powf(theta, -2.0f * (float)i / (float)D), c = cosf(angle), s = sinf(angle);
            float *a = x + h * D + i, *b = a + D / 2, first = *a;
            *a = first * c - *b * s;
            *b = *b * c + first * s;
        }
}

static void softmax(const float *scores, int n, float *out) {
    float peak = scores[0], sum = 0.0f;
    int i;
    for (i = 1; i < n; i++) peak = scores[i] > peak ? scores[i] : peak;
    for (i = 0; i < n; i++) sum += out[i] = expf(scores[i] - peak);
    for (i = 0; i < n; i++) out[i] /= sum;
}

static float silu(float x) { return x / (1.0f + expf(-x)); }

/* Scores, softmax and context of one token over `rows` cache rows; both paths share it but for decode's bugs. */
static void attend(const config *c, const float *q, const float *k, const float *v, int rows, bug b, float *scores,
                   float *probs, float *context) {
    int G = c->kv_heads, D = c->dim, h, s, i;
    float scale = b == MISSING_SCALE ? 1.0f : 1.0f / sqrtf((float)D);
    for (h = 0; h < c->heads; h++) {
        int g = b == GQA_TILE ? h % G : h / (c->heads / G);
        for (s = 0; s < rows; s++) {
            float dot = 0.0f;
            for (i = 0; i < D; i++) dot += q[h * D + i] * k[(s * G + g) * D + i];
            scores[h * rows + s] = dot * scale;
        }
        softmax(scores + h * rows, rows, probs + h * rows);
        for (i = 0; i < D; i++) {
            float sum = 0.0f;
            for (s = 0; s < rows; s++) sum += probs[h * rows + s] * v[(s * G + g) * D + i];
            context[h * D + i] = sum;
        }
    }
}

/* ---- one call: tokens [start, start + T) go in behind the rows that the cache holds ---- */

typedef struct {
    float *x, *norm, *q, *k, *v, *context, *branch, *gate, *up, *scores, *probs, *logits;
} buffers;

static buffers new_buffers(const config *c, int T, int rows) {
    buffers b;
    size_t t = (size_t)T, width = (size_t)c->channels, all = (size_t)c->heads * (size_t)c->dim;
    size_t kv = (size_t)c->kv_heads * (size_t)c->dim, hidden = (size_t)c->hidden;
    b.x = room(t * width, 4), b.norm = room(t * width, 4), b.branch = room(t * width, 4);
    b.q = room(t * all, 4), b.context = room(t * all, 4), b.k = room(t * kv, 4), b.v = room(t * kv, 4);
    b.gate = room(t * hidden, 4), b.up = room(t * hidden, 4), b.logits = room(t * (size_t)c->vocabulary, 4);
    b.scores = room((size_t)c->heads * (size_t)rows, 4), b.probs = room((size_t)c->heads * (size_t)rows, 4);
    return b;
}

static void free_buffers(buffers *b) {
    free(b->x), free(b->norm), free(b->q), free(b->k), free(b->v), free(b->context), free(b->branch);
    free(b->gate), free(b->up), free(b->scores), free(b->probs), free(b->logits);
}

/* A projection in the way of the path that runs: T is 1 and there is a cache in decode. */
static void project(const float *x, const float *w, int T, int rows, int n, int decode, float *out) {
    if (decode) matvec(x, w, rows, n, out);
    else matmul(x, w, T, rows, n, out);
}

static void attention(const model *m, int l, cache *kv, buffers *b, int start, int T, int decode, bug broken, const probe *p) {
    const config *c = &m->c;
    const layer_weights *w = &m->layer[l];
    int C = c->channels, H = c->heads, G = c->kv_heads, D = c->dim, t, row = G * D;
    for (t = 0; t < T; t++) rms_norm(b->x + t * C, w->attn_norm, c->eps, C, b->norm + t * C);
    tap(p, l, "attn_norm", b->norm, start, T, 0, C);
    project(b->norm, w->q, T, H * D, C, decode, b->q), project(b->norm, w->k, T, row, C, decode, b->k);
    project(b->norm, w->v, T, row, C, decode, b->v);
    tap(p, l, "q_proj", b->q, start, T, H, D), tap(p, l, "k_proj", b->k, start, T, G, D);
    tap(p, l, "v_proj", b->v, start, T, G, D);
    for (t = 0; t < T; t++) {
        int position = start + t;
        rope(b->q + t * H * D, H, D, broken == ROPE_POSITION ? position - 1 : position, c->theta);
        rope(b->k + t * row, G, D, position, c->theta);
    }
    tap(p, l, "q_rope", b->q, start, T, H, D), tap(p, l, "k_rope", b->k, start, T, G, D);
    for (t = 0; t < T; t++) {
        int slot = broken == WRONG_SLOT && start + t > 0 ? start + t - 1 : start + t;
        memcpy(kv->k[l] + slot * row, b->k + t * row, (size_t)row * 4);
        memcpy(kv->v[l] + slot * row, b->v + t * row, (size_t)row * 4);
    }
    tap_cache(p, l, "k_cache", kv->k[l], start, T, G, D), tap_cache(p, l, "v_cache", kv->v[l], start, T, G, D);
    for (t = 0; t < T; t++) {
        int rows = start + t + 1;
        attend(c, b->q + t * H * D, kv->k[l], kv->v[l], rows, broken, b->scores, b->probs, b->context + t * H * D);
        tap(p, l, "attn_scores", b->scores, start + t, 1, H, rows), tap(p, l, "attn_probs", b->probs, start + t, 1, H, rows);
    }
    tap(p, l, "attn_ctx", b->context, start, T, H, D);
    project(b->context, w->o, T, C, H * D, decode, b->branch);
    tap(p, l, "attn_out", b->branch, start, T, 0, C);
}

static void feed_forward(const model *m, int l, buffers *b, int start, int T, int decode, const probe *p) {
    const config *c = &m->c;
    const layer_weights *w = &m->layer[l];
    int C = c->channels, t, i;
    for (t = 0; t < T; t++) rms_norm(b->x + t * C, w->ffn_norm, c->eps, C, b->norm + t * C);
    tap(p, l, "ffn_norm", b->norm, start, T, 0, C);
    project(b->norm, w->gate, T, c->hidden, C, decode, b->gate), project(b->norm, w->up, T, c->hidden, C, decode, b->up);
    for (i = 0; i < T * c->hidden; i++) b->gate[i] = silu(b->gate[i]) * b->up[i];
    project(b->gate, w->down, T, C, c->hidden, decode, b->branch);
    tap(p, l, "mlp_out", b->branch, start, T, 0, C);
}

static void forward(const model *m, cache *kv, const int *tokens, int start, int T, bug broken, const probe *p) {
    const config *c = &m->c;
    int C = c->channels, decode = start > 0 && T == 1, l, t, i;
    buffers b = new_buffers(c, T, start + T);
    if (!decode) broken = NO_BUG;
    for (t = 0; t < T; t++) memcpy(b.x + t * C, m->embed + (size_t)tokens[start + t] * (size_t)C, (size_t)C * 4);
    tap(p, -1, "embed", b.x, start, T, 0, C);
    for (l = 0; l < c->layers; l++) {
        tap(p, l, "x_in", b.x, start, T, 0, C);
        attention(m, l, kv, &b, start, T, decode, broken, p);
        for (i = 0; i < T * C; i++) b.x[i] += b.branch[i];
        tap(p, l, "x_mid", b.x, start, T, 0, C);
        feed_forward(m, l, &b, start, T, decode, p);
        for (i = 0; i < T * C; i++) b.x[i] += b.branch[i];
        tap(p, l, "x_out", b.x, start, T, 0, C);
    }
    for (t = 0; t < T; t++) rms_norm(b.x + t * C, m->final_norm, c->eps, C, b.norm + t * C);
    tap(p, -1, "final_norm", b.norm, start, T, 0, C);
    project(b.norm, m->head, T, c->vocabulary, C, decode, b.logits);
    tap(p, -1, "logits", b.logits, start, T, 0, c->vocabulary);
    kv->rows = start + T;
    free_buffers(&b);
}

/* ---- probe: the arms (docs/engines.md) ---- */

typedef struct {
    const char *model, *tokens, *prompt, *mode, *arm, *layers, *out;
    int prompt_len, steps, seed;
    bug broken;
} options;

/* P and P': a prefill of each length, its last position read. */
static void run_prefill(const model *m, const int *tokens, const options *o, probe *p) {
    int step;
    strcpy(p->phase, "prefill_last");
    for (step = 0; step < o->steps; step++) {
        int n = o->prompt_len + step;
        cache kv = new_cache(&m->c, n + 1);
        p->step = step, p->first = p->last = n;
        forward(m, &kv, tokens, 0, n + 1, NO_BUG, p);
        free_cache(&m->c, &kv);
    }
}

/* E1, E7, ...: a prefill that goes on behind the last step, read where P reads. */
static void run_extension(const model *m, const int *tokens, const options *o, probe *p) {
    int n = o->prompt_len + o->steps + atoi(o->arm + 1);
    cache kv = new_cache(&m->c, n);
    strcpy(p->phase, "prefill_ext");
    p->step = 0, p->first = o->prompt_len, p->last = o->prompt_len + o->steps - 1;
    forward(m, &kv, tokens, 0, n, NO_BUG, p);
    free_cache(&m->c, &kv);
}

/* Arm A: put the rows of a prefill of all tokens up to this one into decode's cache, read them back, and say so. */
static void align(const model *m, cache *kv, const int *tokens, int rows, int step, probe *p) {
    static const probe silent;
    const config *c = &m->c;
    cache whole = new_cache(c, rows + 1);
    size_t row = (size_t)c->kv_heads * (size_t)c->dim * 4;
    dp_count counts[2] = {{"rows", 0}, {"different", 0}};
    int l, r;
    forward(m, &whole, tokens, 0, rows + 1, NO_BUG, &silent);
    for (l = 0; l < c->layers; l++) {
        memcpy(kv->k[l], whole.k[l], (size_t)rows * row);
        memcpy(kv->v[l], whole.v[l], (size_t)rows * row);
        for (r = 0; r < rows; r++) {
            size_t at = (size_t)r * row / 4;
            counts[0].value += 2;
            counts[1].value += memcmp(kv->k[l] + at, whole.k[l] + at, row) != 0;
            counts[1].value += memcmp(kv->v[l] + at, whole.v[l] + at, row) != 0;
        }
    }
    free_cache(c, &whole);
    if (dp_event(p->trace, "cache_readback", p->arm, step, counts, 2) != DP_OK)
        die("the trace was not written", dp_message(p->trace), "see above");
}

/* D, D' and A: a prefill of the prompt, then one token after the other with the cache. */
static void run_decode(const model *m, const int *tokens, const options *o, probe *p) {
    static const probe silent;
    cache kv = new_cache(&m->c, o->prompt_len + o->steps);
    int step;
    forward(m, &kv, tokens, 0, o->prompt_len, NO_BUG, &silent);
    for (step = 0; step < o->steps; step++) {
        int n = o->prompt_len + step;
        snprintf(p->phase, sizeof p->phase, "decode%d", step);
        p->step = step, p->first = p->last = n;
        if (o->arm[0] == 'A') align(m, &kv, tokens, n, step, p);
        forward(m, &kv, tokens, n, 1, o->broken, p);
    }
    free_cache(&m->c, &kv);
}

/* What the model computes with, so that a diagnosis can compute what an op's result should have been. */
static void write_constants(const model *m, dp_trace *trace, const char *layers) {
    static const int64_t one[1] = {1};
    const config *c = &m->c;
    int64_t half[1] = {c->dim / 2}, width[1] = {c->channels};
    double eps = (double)c->eps, scale = 1.0 / sqrt((double)c->dim);
    float *frequencies = room((size_t)c->dim, sizeof *frequencies);
    dp_tensor t = dp_make_tensor(&eps, DP_FLOAT64, 1, one), s = dp_make_tensor(&scale, DP_FLOAT64, 1, one);
    int l, i;
    for (i = 0; i < c->dim / 2; i++) frequencies[i] = powf(c->theta, -2.0f * (float)i / (float)c->dim);
    for (l = 0; l < c->layers; l++) {
        dp_tensor f = dp_make_tensor(frequencies, DP_FLOAT32, 1, half);
        dp_tensor a = dp_make_tensor(m->layer[l].attn_norm, DP_FLOAT32, 1, width);
        dp_tensor b = dp_make_tensor(m->layer[l].ffn_norm, DP_FLOAT32, 1, width);
        if (layers[l] != '1') continue;
        dp_constant(trace, l, "attn_norm.weight", &a), dp_constant(trace, l, "attn_norm.eps", &t);
        dp_constant(trace, l, "ffn_norm.weight", &b), dp_constant(trace, l, "ffn_norm.eps", &t);
        dp_constant(trace, l, "attn_scores.scale", &s);
        if (dp_constant(trace, l, "rope.inv_freq", &f) != DP_OK)
            die("the trace was not written", dp_message(trace), "see above");
    }
    free(frequencies);
}

static dp_trace *open_trace(const model *m, const int *tokens, int count, const options *o, const char *chosen) {
    static const char *inside[] = {"x_in", "attn_norm", "q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "k_cache", "v_cache",
                                   "attn_scores", "attn_probs", "attn_ctx", "attn_out", "x_mid", "ffn_norm", "mlp_out",
                                   "x_out"};
    static const char *outside[] = {"embed", "final_norm", "logits"};
    enum { INSIDE = sizeof inside / sizeof *inside };
    dp_header h = dp_default_header(o->prompt, o->mode);
    dp_tap taps[INSIDE + 3];
    int64_t *ids = room((size_t)count, sizeof *ids), *layers = room((size_t)m->c.layers, sizeof *layers);
    size_t recorded = 0;
    dp_trace *trace;
    int i;
    for (i = 0; i < count; i++) ids[i] = tokens[i];
    for (i = 0; i < m->c.layers; i++)
        if (chosen[i] == '1') layers[recorded++] = i;
    for (i = 0; i < INSIDE; i++) taps[i].name = inside[i], taps[i].layers = layers, taps[i].layer_count = recorded;
    for (i = 0; i < 3; i++) taps[INSIDE + i].name = outside[i], taps[INSIDE + i].layers = NULL, taps[INSIDE + i].layer_count = 0;
    h.taps = taps, h.tap_count = INSIDE + 3;
    h.token_ids = ids, h.token_count = (size_t)count, h.prompt_len = o->prompt_len, h.steps = o->steps, h.seed = o->seed;
    h.engine = "c_engine", h.version = "1", h.model = o->model, h.dtype = "float32", h.attention = "eager", h.device = "cpu";
    h.layers = m->c.layers, h.heads = m->c.heads, h.kv_heads = m->c.kv_heads;
    h.vocabulary = m->c.vocabulary, h.max_positions = m->c.positions, h.payloads = 1;
    if (dp_open(&trace, o->out, &h) != DP_OK) die("the trace cannot be opened", dp_message(NULL), "make its folder first");
    free(ids), free(layers);
    return trace;
}

/* ---- the command line ---- */

static int *read_tokens(const char *path, const model *m, int *count) {
    size_t size;
    char *text = read_file("", path, &size), *at = text, *end;
    int *tokens = room(size + 1, sizeof *tokens);
    for (*count = 0;; at = end) {
        long id = strtol(at, &end, 10);
        if (end == at) break;
        if (id < 0 || id >= m->c.vocabulary) die("a token that the model does not have", path, "use ids below vocab_size");
        tokens[(*count)++] = (int)id;
    }
    free(text);
    return tokens;
}

static char *read_layers(const char *word, int count) {
    char *chosen = room((size_t)count + 1, 1);
    memset(chosen, strcmp(word, "all") ? '0' : '1', (size_t)count);
    while (strcmp(word, "all") && *word) {
        char *end;
        long l = strtol(word, &end, 10);
        if (end == word || l < 0 || l >= count) die("a layer that the model does not have", word, "use 0,1,... or all");
        chosen[l] = '1';
        word = *end == ',' ? end + 1 : end;
    }
    return chosen;
}

static bug read_bug(const char *word) {
    size_t i;
    for (i = 0; i < sizeof bugs / sizeof *bugs; i++)
        if (!strcmp(word, bugs[i].name)) return (bug)i;
    for (i = 0; i < sizeof bugs / sizeof *bugs; i++) fprintf(stderr, "  %-14s %s\n", bugs[i].name, bugs[i].about);
    die("unknown bug", word, "choose one of those above");
    return NO_BUG;
}

static options read_options(int argc, char **argv) {
    options o = {0};
    int i;
    o.prompt = "p0", o.mode = "as_designed", o.arm = "P", o.layers = "all", o.steps = 1;
    for (i = 1; i + 1 < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!strcmp(name, "--model")) o.model = value;
        else if (!strcmp(name, "--tokens")) o.tokens = value;
        else if (!strcmp(name, "--prompt")) o.prompt = value;
        else if (!strcmp(name, "--prompt-len")) o.prompt_len = atoi(value);
        else if (!strcmp(name, "--steps")) o.steps = atoi(value);
        else if (!strcmp(name, "--mode")) o.mode = value;
        else if (!strcmp(name, "--arm")) o.arm = value;
        else if (!strcmp(name, "--seed")) o.seed = atoi(value);
        else if (!strcmp(name, "--layers")) o.layers = value;
        else if (!strcmp(name, "--bug")) o.broken = read_bug(value);
        else if (!strcmp(name, "--out")) o.out = value;
        else die("unknown option", name, "see the first lines of llama.c");
    }
    if (i < argc) die("an option without a value", argv[i], "give it one");
    if (!o.model || !o.tokens || !o.out || o.prompt_len < 0 || o.steps < 1)
        die("an option is missing", "--model, --tokens, --prompt-len and --out are needed", "see the first lines of llama.c");
    return o;
}

int main(int argc, char **argv) {
    options o = read_options(argc, argv);
    model m = load(o.model);
    int count, extra = o.arm[0] == 'E' ? atoi(o.arm + 1) : 0;
    int *tokens = read_tokens(o.tokens, &m, &count);
    char *layers = read_layers(o.layers, m.c.layers);
    probe p;
    memset(&p, 0, sizeof p);
    if (o.prompt_len < 1 && o.arm[0] != 'P') die("an empty prompt", "--prompt-len 0", "only arm P may have it");
    if (count < o.prompt_len + o.steps + extra || o.prompt_len + o.steps + extra > m.c.positions)
        die("too few tokens, or more than the model has positions", o.tokens, "give prompt, steps and extension");
    p.trace = open_trace(&m, tokens, count, &o, layers), p.arm = o.arm, p.layers = layers, p.tokens = tokens;
    if (o.arm[0] == 'P') run_prefill(&m, tokens, &o, &p);
    else if (o.arm[0] == 'D' || o.arm[0] == 'A') run_decode(&m, tokens, &o, &p);
    else if (o.arm[0] == 'E' && extra > 0) run_extension(&m, tokens, &o, &p);
    else die("unknown arm", o.arm, "P, P', D, D', A, E1, E7, ...");
    if (!strcmp(o.arm, "P")) write_constants(&m, p.trace, layers);
    if (dp_close(p.trace) != DP_OK) die("the trace was not finished", dp_message(NULL), "free some space and run again");
    fprintf(stderr, "arm %s of %s: wrote %s\n", o.arm, o.prompt, o.out);
    free(tokens), free(layers), free(m.layer), free(m.index);
    return 0;
}
