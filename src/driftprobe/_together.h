/* One large tensor by several threads, with the same result to the bit as by one: sums are made block by block, whoever
 * makes them, and added up in order. The hash goes through the tensor from its first byte to its last, so one thread at a
 * time does that, the one that comes by; the others sum up blocks meanwhile. SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>

#define WORTH_IT (1 << 20) /* elements; below, starting threads takes longer than it saves */
#define MOST_THREADS 64

/* What a block of 65536 elements comes to. */
typedef struct block {
    dp__sums sums;
    int64_t nan_count, inf_count;
    double sketch[DP_SKETCH_SIZE];
} block;

typedef struct team {
    const dp_tensor *tensor;
    dp__rows *rows;
    block *blocks;
    size_t count, summed, hashed; /* blocks: of the tensor, given out for sums, given out for the hash */
    int hashing;                  /* a thread adds to the hash */
    dp__hasher *whole;
    pthread_mutex_t lock;
} team;

typedef struct worker {
    team *team;
    dp__room *room;
    pthread_t thread;
} worker;

/* Give out work, nearest first: what is hashed close behind its sums is still in cache. Returns what to do with block
 * `*which`, or 0 where nothing is left to begin. */
static int next_work(team *t, size_t *which, int hashed_before) {
    int what = 0;
    pthread_mutex_lock(&t->lock);
    if (hashed_before) t->hashing = 0;
    if (!t->hashing && t->hashed < t->count) {
        t->hashing = 1, *which = t->hashed++, what = DP__HASH;
        if (*which == t->summed) t->summed++, what |= DP__SUM;
    } else if (t->summed < t->count) {
        *which = t->summed++, what = DP__SUM;
    }
    pthread_mutex_unlock(&t->lock);
    return what;
}

static void do_block(team *t, size_t which, int what, dp__room *room) {
    block *b = &t->blocks[which];
    double unused[DP_SKETCH_SIZE];
    const int64_t first = (int64_t)which * DP__BLOCK;
    dp__pass p = dp__begin_pass(t->tensor, first, DP_SKETCH_SIZE, what & DP__SUM ? b->sketch : unused, room);
    dp__pass_block(&p, what, t->whole, t->rows);
    if (!(what & DP__SUM)) return;
    if (p.sketch.filled) dp__end_block(&p.sketch);
    b->sums = p.sums, b->nan_count = p.nan_count, b->inf_count = p.inf_count;
}

static DP__APART void do_blocks(worker *w) {
    size_t which = 0;
    int what = 0;
    while ((what = next_work(w->team, &which, what & DP__HASH)) != 0) do_block(w->team, which, what, w->room);
}

static void *work(void *given) {
    const unsigned mode = dp__plain_arithmetic();
    do_blocks((worker *)given);
    dp__arithmetic_again(mode);
    return NULL;
}

/* Have the work done by this thread and so many others as can be had. */
static void run_team(team *t, dp__room *room, int threads) {
    worker workers[MOST_THREADS];
    int i, begun = 1;
    workers[0].team = t, workers[0].room = room;
    for (i = 1; i < threads; i++) {
        worker *w = &workers[begun];
        w->team = t, w->room = dp__new_room(dp__elements(t->tensor), DP_SKETCH_SIZE);
        if (w->room && pthread_create(&w->thread, NULL, work, w) == 0) begun++;
        else dp__free_room(w->room);
    }
    work(&workers[0]);
    for (i = 1; i < begun; i++) pthread_join(workers[i].thread, NULL), dp__free_room(workers[i].room);
}

/* Add the blocks up in order, as one pass does. */
static void add_up(const team *t, dp__pass *p, double *sketch) {
    size_t k, b;
    for (k = 0; k < t->count; k++) {
        dp__pool(&p->sums, &t->blocks[k].sums);
        p->nan_count += t->blocks[k].nan_count, p->inf_count += t->blocks[k].inf_count;
        for (b = 0; b < DP_SKETCH_SIZE; b++) sketch[b] = dp__saturate(sketch[b] + t->blocks[k].sketch[b]);
    }
}

/* Measure a tensor whose blocks have their place in `t`. */
static DP__APART void measure_blocks(team *t, size_t size, dp_fingerprint *print, double *sketch, dp__room *room, int threads) {
    dp__pass p;
    dp__hash_begin(&room->whole, (uint64_t)dp__elements(t->tensor) * dp__dtypes[t->tensor->dtype].size);
    run_team(t, room, threads < MOST_THREADS ? threads : MOST_THREADS);
    p = dp__begin_pass(t->tensor, 0, size, sketch, room);
    add_up(t, &p, sketch);
    dp__conclude(t->tensor, &p, dp__hash_end(&room->whole), print);
}

/* Measure a tensor by several threads; 0, with nothing done, where that is not worth it or there is no memory for it. */
static int measure_together(const dp_tensor *tensor, size_t size, dp_fingerprint *print, double *sketch, dp__rows *rows,
                            dp__room *room, int threads) {
    const int64_t elements = dp__elements(tensor);
    unsigned mode;
    team t;
    if (threads < 2 || size != DP_SKETCH_SIZE || elements < WORTH_IT) return 0;
    memset(&t, 0, sizeof t);
    t.tensor = tensor, t.rows = rows, t.whole = &room->whole;
    t.count = (size_t)((elements + DP__BLOCK - 1) / DP__BLOCK);
    if (!(t.blocks = (block *)malloc(t.count * sizeof *t.blocks))) return 0;
    if (pthread_mutex_init(&t.lock, NULL)) return free(t.blocks), 0;
    mode = dp__plain_arithmetic();
    measure_blocks(&t, size, print, sketch, room, threads);
    dp__arithmetic_again(mode);
    pthread_mutex_destroy(&t.lock);
    free(t.blocks);
    return 1;
}
