/* driftprobe._core: the fingerprint of include/driftprobe.h for Python, without the interpreter's lock.
 *
 * Tensors come as an address, a dtype's number, a shape and strides in bytes, so that no array library is needed to
 * build it. fingerprint.py calls it and keeps the array alive. SPDX-License-Identifier: Apache-2.0 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define DRIFTPROBE_IMPLEMENTATION
#include "driftprobe.h"

/* Read (address, dtype, shape, strides in bytes) into a tensor; 0 with a Python error where that is none. */
static int read_tensor(PyObject *address, int dtype, PyObject *shape, PyObject *strides, dp_tensor *t) {
    Py_ssize_t d, ndim = PyTuple_Size(shape);
    int64_t size;
    memset(t, 0, sizeof *t);
    if (ndim < 0 || PyTuple_Size(strides) != ndim || ndim > DP_MAX_DIMS) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "shape and strides of two lengths, or too many axes");
        return 0;
    }
    t->data = PyLong_AsVoidPtr(address), t->dtype = dtype, t->ndim = (int)ndim;
    size = dtype < 0 || dtype > DP_BOOL ? 1 : (int64_t)dp__dtypes[dtype].size;
    for (d = 0; d < ndim; d++) {
        t->shape[d] = PyLong_AsLongLong(PyTuple_GetItem(shape, d));
        t->strides[d] = PyLong_AsLongLong(PyTuple_GetItem(strides, d));
        if (t->strides[d] % size && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a stride that is no element");
        t->strides[d] /= size;
    }
    return PyErr_Occurred() == NULL;
}

/* A hash as the format writes it: 0x and 16 lower-case hexadecimal digits. */
static PyObject *text_of(uint64_t hash) {
    char text[18] = "0x";
    int i;
    for (i = 17; i > 1; i--, hash >>= 4) text[i] = "0123456789abcdef"[hash & 15];
    return PyUnicode_FromStringAndSize(text, 18);
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

/* Pass over a tensor, and hash its rows in the same pass; those of empty rows one by one. */
static int measure(const dp_tensor *t, size_t size, measured *m) {
    dp__room *room = dp__new_room();
    dp__rows rows;
    int64_t r, fused = m->hashed > 0 && dp__elements(t) > 0;
    memset(&rows, 0, sizeof rows);
    if (!room || (fused && !(rows.state = XXH3_createState()))) {
        dp__free_room(room);
        return 0;
    }
    if (fused) rows.hashes = m->hashes, rows.bytes = (size_t)(dp__elements(t) / m->hashed) * dp__dtypes[t->dtype].size;
    dp__measure(t, size, &m->print, m->sketch, fused ? &rows : NULL, room);
    for (r = 0; !fused && r < m->hashed; r++) m->hashes[r] = dp__row_hash(t, r, room);
    if (rows.state) XXH3_freeState(rows.state);
    dp__free_room(room);
    return 1;
}

static PyObject *fingerprint_of(const dp_tensor *t, size_t size, measured *m) {
    PyObject *sums, *rows = NULL;
    size_t b;
    int done;
    Py_BEGIN_ALLOW_THREADS
    done = measure(t, size, m);
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
    PyObject *address, *shape, *strides, *found;
    dp_tensor t;
    measured m;
    Py_ssize_t size;
    int dtype, with_rows;
    (void)self;
    if (!PyArg_ParseTuple(args, "OiO!O!np", &address, &dtype, &PyTuple_Type, &shape, &PyTuple_Type, &strides, &size, &with_rows)) return NULL;
    if (!read_tensor(address, dtype, shape, strides, &t)) return NULL;
    if (size < 1 || size > DP__BLOCK) return PyErr_Format(PyExc_ValueError, "a sketch of %zd sums", size);
    if (dp__tensor_fault(&t) || (with_rows && t.ndim < 1)) return PyErr_Format(PyExc_ValueError, "not a tensor of the format");
    memset(&m, 0, sizeof m);
    m.hashed = with_rows ? t.shape[0] : -1;
    m.sketch = (double *)malloc((size_t)size * sizeof *m.sketch);
    m.hashes = (uint64_t *)malloc((size_t)(m.hashed > 0 ? m.hashed : 1) * sizeof *m.hashes);
    found = m.sketch && m.hashes ? fingerprint_of(&t, (size_t)size, &m) : PyErr_NoMemory();
    free(m.sketch), free(m.hashes);
    return found;
}

static PyObject *row_hashes(PyObject *self, PyObject *args) {
    PyObject *address, *shape, *strides, *found;
    dp__room *room;
    dp_tensor t;
    uint64_t *hashes;
    int64_t r, rows;
    int dtype;
    (void)self;
    if (!PyArg_ParseTuple(args, "OiO!O!", &address, &dtype, &PyTuple_Type, &shape, &PyTuple_Type, &strides)) return NULL;
    if (!read_tensor(address, dtype, shape, strides, &t)) return NULL;
    if (dp__tensor_fault(&t) || t.ndim < 1) return PyErr_Format(PyExc_ValueError, "not a tensor with rows");
    rows = t.shape[0];
    hashes = (uint64_t *)malloc((size_t)(rows ? rows : 1) * sizeof *hashes);
    if (!hashes) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    if ((room = dp__new_room()) != NULL)
        for (r = 0; r < rows; r++) hashes[r] = dp__row_hash(&t, r, room);
    dp__free_room(room);
    Py_END_ALLOW_THREADS
    found = room ? texts_of(hashes, rows) : PyErr_NoMemory();
    free(hashes);
    return found;
}

static PyMethodDef methods[] = {
    {"fingerprint", fingerprint, METH_VARARGS,
     "fingerprint(address, dtype, shape, strides, size, rows): hash, nz, abs_sum, min, max, mean, l2, nan, inf, sketch, row hashes or None"},
    {"row_hashes", row_hashes, METH_VARARGS, "row_hashes(address, dtype, shape, strides): a hash for each row"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_core", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void) { return PyModule_Create(&module); }
