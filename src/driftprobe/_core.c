/* driftprobe._core: the fingerprint of include/driftprobe.h for Python, without the interpreter's lock.
 *
 * Tensors come as an address, a dtype's number, a shape and strides in elements, so that no array library is needed to
 * build it. fingerprint.py calls it and keeps the array alive. SPDX-License-Identifier: Apache-2.0 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define DRIFTPROBE_IMPLEMENTATION
#include "driftprobe.h"

/* Read (address, dtype, shape, strides) into a tensor; 0 with a Python error where that is none. */
static int read_tensor(PyObject *address, int dtype, PyObject *shape, PyObject *strides, dp_tensor *t) {
    Py_ssize_t d, ndim = PyTuple_Size(shape);
    memset(t, 0, sizeof *t);
    if (ndim < 0 || PyTuple_Size(strides) != ndim || ndim > DP_MAX_DIMS) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "shape and strides of two lengths, or too many axes");
        return 0;
    }
    t->data = PyLong_AsVoidPtr(address), t->dtype = dtype, t->ndim = (int)ndim;
    for (d = 0; d < ndim; d++) {
        t->shape[d] = PyLong_AsLongLong(PyTuple_GetItem(shape, d));
        t->strides[d] = PyLong_AsLongLong(PyTuple_GetItem(strides, d));
    }
    return PyErr_Occurred() == NULL;
}

static PyObject *fingerprint(PyObject *self, PyObject *args) {
    PyObject *address, *shape, *strides, *sums, *found;
    dp_fingerprint print;
    dp_tensor t;
    dp_status status;
    double *sketch;
    Py_ssize_t size, b;
    int dtype;
    (void)self;
    if (!PyArg_ParseTuple(args, "OiO!O!n", &address, &dtype, &PyTuple_Type, &shape, &PyTuple_Type, &strides, &size)) return NULL;
    if (!read_tensor(address, dtype, shape, strides, &t)) return NULL;
    if (size < 1 || size > DP__BLOCK) return PyErr_Format(PyExc_ValueError, "a sketch of %zd sums", size);
    if (!(sketch = (double *)malloc((size_t)size * sizeof *sketch))) return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    status = dp_fingerprint_of(&t, (size_t)size, &print, sketch);
    Py_END_ALLOW_THREADS
    if (status != DP_OK) {
        free(sketch);
        return status == DP_NO_MEMORY ? PyErr_NoMemory() : PyErr_Format(PyExc_ValueError, "not a tensor of the format");
    }
    if ((sums = PyTuple_New(size)) != NULL)
        for (b = 0; b < size; b++) PyTuple_SetItem(sums, b, PyFloat_FromDouble(sketch[b]));
    free(sketch);
    if (!sums) return NULL;
    found = Py_BuildValue("(KLLLdddddN)", (unsigned long long)print.hash, (long long)print.nz_count,
                          (long long)print.nan_count, (long long)print.inf_count, print.abs_sum, print.min, print.max,
                          print.mean, print.l2, sums);
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
    found = room ? PyTuple_New((Py_ssize_t)rows) : PyErr_NoMemory();
    for (r = 0; found && r < rows; r++) PyTuple_SetItem(found, (Py_ssize_t)r, PyLong_FromUnsignedLongLong(hashes[r]));
    free(hashes);
    return found;
}

static PyMethodDef methods[] = {
    {"fingerprint", fingerprint, METH_VARARGS,
     "fingerprint(address, dtype, shape, strides, size): hash, nz, nan, inf, abs_sum, min, max, mean, l2, sketch"},
    {"row_hashes", row_hashes, METH_VARARGS, "row_hashes(address, dtype, shape, strides): a hash for each row"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_core", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void) { return PyModule_Create(&module); }
