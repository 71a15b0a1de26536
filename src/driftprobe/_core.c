/* driftprobe._core: the fingerprint of include/driftprobe.h for Python, without the interpreter's lock.
 *
 * Tensors come as whatever has NumPy's array interface, with their dtype's number, so that no array library is needed to
 * build it. The caller keeps the array alive. SPDX-License-Identifier: Apache-2.0 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define DRIFTPROBE_IMPLEMENTATION
#include "driftprobe.h"
#include "_together.h"
#ifdef __SIZEOF_INT128__
#include "_shortest.h"
#endif

/* NumPy's array interface, by its own description: what `__array_struct__` points to. */
typedef struct interface {
    int two, ndim;
    char kind;
    int size, flags;
    Py_ssize_t *shape, *strides;
    void *data;
} interface;

/* Read an array into a tensor; 0 with a Python error where it is none of this dtype's size. */
static int read_array(PyObject *array, int dtype, dp_tensor *t) {
    PyObject *capsule = PyObject_GetAttrString(array, "__array_struct__");
    const interface *found = capsule ? (const interface *)PyCapsule_GetPointer(capsule, NULL) : NULL;
    int d, fits;
    memset(t, 0, sizeof *t);
    fits = found && found->two == 2 && dtype >= 0 && dtype <= DP_BOOL && found->size == (int)dp__dtypes[dtype].size
           && found->ndim <= DP_MAX_DIMS;
    if (fits) t->data = found->data, t->dtype = dtype, t->ndim = found->ndim;
    for (d = 0; fits && d < found->ndim; d++) {
        t->shape[d] = found->shape[d], t->strides[d] = found->strides[d] / found->size;
        fits = found->strides[d] % found->size == 0;
    }
    Py_XDECREF(capsule);
    if (!fits && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "not an array of this dtype");
    return fits;
}

#define HASH_SIZE 18

/* Write a hash as the format has it, 0x and 16 lower-case hexadecimal digits; returns what stands behind it. */
static char *put_hash(char *out, uint64_t hash) {
    int i;
    *out++ = '0', *out++ = 'x';
    for (i = 60; i >= 0; i -= 4) *out++ = "0123456789abcdef"[hash >> i & 15];
    return out;
}

static PyObject *text_of(uint64_t hash) {
    char text[HASH_SIZE];
    put_hash(text, hash);
    return PyUnicode_FromStringAndSize(text, HASH_SIZE);
}

static PyObject *texts_of(const uint64_t *hashes, int64_t n) {
    PyObject *found = PyTuple_New((Py_ssize_t)n);
    int64_t i;
    for (i = 0; found && i < n; i++) PyTuple_SetItem(found, (Py_ssize_t)i, text_of(hashes[i]));
    return found;
}

/* What one pass fills; -1 in `hashed` where no rows are asked for. */
typedef struct measured {
    dp_fingerprint print;
    double *sketch;
    uint64_t *hashes;
    int64_t hashed;
} measured;

/* Pass over a tensor, and hash its rows in the same pass; those of empty rows one by one. 0 where there is no memory. */
static int measure(const dp_tensor *t, size_t size, measured *m, dp__room *room, int threads) {
    dp__rows rows;
    int64_t r, fused = m->hashed > 0 && dp__elements(t) > 0;
    if (!room) return 0;
    rows.hasher = &room->row, room->row.seen = 0;
    rows.hashes = m->hashes, rows.bytes = fused ? (size_t)(dp__elements(t) / m->hashed) * dp__dtypes[t->dtype].size : 0;
    if (!measure_together(t, size, &m->print, m->sketch, fused ? &rows : NULL, room, threads))
        dp__measure(t, size, &m->print, m->sketch, fused ? &rows : NULL, room);
    for (r = 0; !fused && r < m->hashed; r++) m->hashes[r] = dp__row_hash(t, r, room);
    return 1;
}

static PyObject *fingerprint_of(const dp_tensor *t, size_t size, measured *m, int threads) {
    PyObject *sums, *rows = NULL;
    dp__room *room;
    size_t b;
    int done;
    Py_BEGIN_ALLOW_THREADS
    room = dp__new_room(dp__elements(t), size);
    done = measure(t, size, m, room, threads);
    dp__free_room(room);
    Py_END_ALLOW_THREADS
    if (!done) return PyErr_NoMemory();
    if (!(sums = PyTuple_New((Py_ssize_t)size))) return NULL;
    for (b = 0; b < size; b++) PyTuple_SetItem(sums, (Py_ssize_t)b, PyFloat_FromDouble(m->sketch[b]));
    if (m->hashed >= 0 && !(rows = texts_of(m->hashes, m->hashed))) {
        Py_DECREF(sums);
        return NULL;
    }
    if (!rows) Py_INCREF(rows = Py_None);
    return Py_BuildValue("(NLdddddLLNN)", text_of(m->print.hash), (long long)m->print.nz_count, m->print.abs_sum,
                         m->print.min, m->print.max, m->print.mean, m->print.l2, (long long)m->print.nan_count,
                         (long long)m->print.inf_count, sums, rows);
}

static PyObject *fingerprint(PyObject *self, PyObject *args) {
    PyObject *array, *found;
    dp_tensor t;
    measured m;
    Py_ssize_t size;
    int dtype, with_rows, threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oinpi", &array, &dtype, &size, &with_rows, &threads)) return NULL;
    if (!read_array(array, dtype, &t)) return NULL;
    if (size < 1 || size > DP__BLOCK) return PyErr_Format(PyExc_ValueError, "a sketch of %zd sums", size);
    if (threads < 1) return PyErr_Format(PyExc_ValueError, "%d threads", threads);
    if (dp__tensor_fault(&t) || (with_rows && t.ndim < 1)) return PyErr_Format(PyExc_ValueError, "not a tensor of the format");
    memset(&m, 0, sizeof m);
    m.hashed = with_rows ? t.shape[0] : -1;
    m.sketch = (double *)malloc((size_t)size * sizeof *m.sketch);
    m.hashes = (uint64_t *)malloc((size_t)(m.hashed > 0 ? m.hashed : 1) * sizeof *m.hashes);
    found = m.sketch && m.hashes ? fingerprint_of(&t, (size_t)size, &m, threads) : PyErr_NoMemory();
    free(m.sketch), free(m.hashes);
    return found;
}

static PyObject *row_hashes(PyObject *self, PyObject *args) {
    PyObject *array, *found;
    dp__room *room;
    dp_tensor t;
    uint64_t *hashes;
    int64_t r, rows;
    int dtype;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oi", &array, &dtype)) return NULL;
    if (!read_array(array, dtype, &t)) return NULL;
    if (dp__tensor_fault(&t) || t.ndim < 1) return PyErr_Format(PyExc_ValueError, "not a tensor with rows");
    rows = t.shape[0];
    hashes = (uint64_t *)malloc((size_t)(rows ? rows : 1) * sizeof *hashes);
    if (!hashes) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    if ((room = dp__new_room(dp__elements(&t), 0)) != NULL)
        for (r = 0; r < rows; r++) hashes[r] = dp__row_hash(&t, r, room);
    dp__free_room(room);
    Py_END_ALLOW_THREADS
    found = room ? texts_of(hashes, rows) : PyErr_NoMemory();
    free(hashes);
    return found;
}

#ifdef __SIZEOF_INT128__
/* One record whose line is asked for: its tensor, and the text that stands before the hash, behind it, and at the end. */
typedef struct job {
    dp_tensor t;
    char *text[3];
    Py_ssize_t size[3];
    measured m;
    char *line, *end;
} job;

static char *put(char *out, const char *text, size_t size) {
    memcpy(out, text, size);
    return out + size;
}
#define PUT(out, text) put(out, text, sizeof(text) - 1)

static char *put_quoted_hash(char *out, uint64_t hash) { return PUT(put_hash(PUT(out, "\""), hash), "\""); }

static char *put_count(char *out, int64_t n) {
    char digits[20];
    int at = 20;
    do digits[--at] = (char)('0' + n % 10);
    while (n /= 10);
    return put(out, digits + at, (size_t)(20 - at));
}

/* Write one line; 0 where a statistic is not finite, which is none. */
static int write_line(job *j, size_t size) {
    const dp_fingerprint *p = &j->m.print;
    static const char *const NAMES[5] = {",\"abs_sum\":", ",\"min\":", ",\"max\":", ",\"mean\":", ",\"l2\":"};
    double moments[5];
    char *out = put(j->line, j->text[0], (size_t)j->size[0]);
    size_t i;
    int64_t r;
    moments[0] = p->abs_sum, moments[1] = p->min, moments[2] = p->max, moments[3] = p->mean, moments[4] = p->l2;
    out = put_quoted_hash(PUT(out, ",\"hash\":"), p->hash);
    out = put(out, j->text[1], (size_t)j->size[1]);
    out = put_count(PUT(out, ",\"nz_count\":"), p->nz_count);
    for (i = 0; i < 5; i++) {
        if (!isfinite(moments[i])) return 0;
        out = shortest(moments[i], put(out, NAMES[i], strlen(NAMES[i])));
    }
    out = put_count(PUT(out, ",\"nan_count\":"), p->nan_count);
    out = put_count(PUT(out, ",\"inf_count\":"), p->inf_count);
    out = PUT(out, ",\"sketch\":");
    for (i = 0; i < size; i++) {
        if (!isfinite(j->m.sketch[i])) return 0;
        *out++ = i ? ',' : '[';
        out = shortest(j->m.sketch[i], out);
    }
    *out++ = ']';
    if (j->m.hashed >= 0) {
        out = PUT(out, ",\"rows\":[");
        for (r = 0; r < j->m.hashed; r++) {
            if (r) *out++ = ',';
            out = put_quoted_hash(out, j->m.hashes[r]);
        }
        *out++ = ']';
    }
    j->end = put(out, j->text[2], (size_t)j->size[2]);
    return 1;
}

/* Read one of Python's jobs, and make room for what comes of it; 0 with a Python error. */
static int read_job(PyObject *given, size_t size, job *j) {
    PyObject *text[3], *array;
    size_t room = 512 + (size_t)SHORTEST_ROOM * size;
    int i, dtype, with_rows;
    if (!PyTuple_Check(given)) return PyErr_SetString(PyExc_TypeError, "a job is a tuple"), 0;
    if (!PyArg_ParseTuple(given, "SSSOip", &text[0], &text[1], &text[2], &array, &dtype, &with_rows)) return 0;
    if (!read_array(array, dtype, &j->t)) return 0;
    if (dp__tensor_fault(&j->t) || (with_rows && j->t.ndim < 1))
        return PyErr_SetString(PyExc_ValueError, "not a tensor of the format"), 0;
    for (i = 0; i < 3; i++) {
        if (PyBytes_AsStringAndSize(text[i], &j->text[i], &j->size[i])) return 0;
        room += (size_t)j->size[i];
    }
    j->m.hashed = with_rows ? j->t.shape[0] : -1;
    if (j->m.hashed > 0) room += 21 * (size_t)j->m.hashed;
    j->m.sketch = (double *)malloc(size * sizeof *j->m.sketch);
    j->m.hashes = (uint64_t *)malloc((size_t)(j->m.hashed > 0 ? j->m.hashed : 1) * sizeof *j->m.hashes);
    j->line = (char *)malloc(room);
    return j->m.sketch && j->m.hashes && j->line ? 1 : (PyErr_NoMemory(), 0);
}

/* Return the lines of all jobs, which were read; the interpreter's lock is given away for the whole of the work. */
static PyObject *lines_of(job *jobs, Py_ssize_t count, size_t size) {
    PyObject *found, *line;
    dp__room *room;
    Py_ssize_t i;
    int64_t most = 0;
    int fault = 0;
    Py_BEGIN_ALLOW_THREADS
    for (i = 0; i < count; i++)
        if (dp__elements(&jobs[i].t) > most) most = dp__elements(&jobs[i].t);
    room = dp__new_room(most, size);
    for (i = 0; i < count && !fault; i++)
        fault = !measure(&jobs[i].t, size, &jobs[i].m, room, 1) ? 1 : !write_line(&jobs[i], size) ? 2 : 0;
    dp__free_room(room);
    Py_END_ALLOW_THREADS
    if (fault == 1) return PyErr_NoMemory();
    if (fault) return PyErr_Format(PyExc_ValueError, "a statistic that is not finite");
    if (!(found = PyList_New(count))) return NULL;
    for (i = 0; i < count; i++) {
        if (!(line = PyBytes_FromStringAndSize(jobs[i].line, jobs[i].end - jobs[i].line))) {
            Py_DECREF(found);
            return NULL;
        }
        PyList_SetItem(found, i, line);
    }
    return found;
}

static PyObject *lines(PyObject *self, PyObject *args) {
    PyObject *given, *found = NULL;
    Py_ssize_t size, count, i;
    job *jobs;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!n", &PyTuple_Type, &given, &size)) return NULL; /* a tuple keeps its items alive */
    if (size < 1 || size > DP__BLOCK) return PyErr_Format(PyExc_ValueError, "a sketch of %zd sums", size);
    count = PyTuple_Size(given);
    if (!(jobs = (job *)calloc((size_t)(count ? count : 1), sizeof *jobs))) return PyErr_NoMemory();
    for (i = 0; i < count; i++)
        if (!read_job(PyTuple_GetItem(given, i), (size_t)size, &jobs[i])) break;
    if (i == count) found = lines_of(jobs, count, (size_t)size);
    for (i = 0; i < count; i++) free(jobs[i].m.sketch), free(jobs[i].m.hashes), free(jobs[i].line);
    free(jobs);
    return found;
}
#endif

static PyMethodDef methods[] = {
#ifdef __SIZEOF_INT128__
    {"lines", lines, METH_VARARGS,
     "lines(jobs, size): the JSON line of each (before the hash, behind it, end, array, dtype, rows)"},
#endif
    {"fingerprint", fingerprint, METH_VARARGS,
     "fingerprint(array, dtype, size, rows, threads): hash, nz, abs_sum, min, max, mean, l2, nan, inf, sketch, row hashes or None"},
    {"row_hashes", row_hashes, METH_VARARGS, "row_hashes(array, dtype): a hash for each row"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_core", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void) {
#ifdef __SIZEOF_INT128__
    shortest_begin();
#endif
    return PyModule_Create(&module);
}
