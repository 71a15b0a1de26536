/* driftprobe._scan: the records of a trace file as columns, without the interpreter's lock.
 *
 * What is taken and what is left alone: _records.h. SPDX-License-Identifier: Apache-2.0 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_records.h"

static void free_words(PyObject *capsule) {
    words *known = (words *)PyCapsule_GetPointer(capsule, "driftprobe.words");
    int32_t i;
    for (i = 0; known && i < known->count; i++) free(known->text[i]);
    free(known);
}

static PyObject *new_words(PyObject *self, PyObject *args) {
    words *known = (words *)calloc(1, sizeof *known);
    (void)self, (void)args;
    return known ? PyCapsule_New(known, "driftprobe.words", free_words) : PyErr_NoMemory();
}

static PyObject *list_words(PyObject *self, PyObject *capsule) {
    words *known = (words *)PyCapsule_GetPointer(capsule, "driftprobe.words");
    PyObject *found = known ? PyList_New(known->count) : NULL;
    int32_t i;
    (void)self;
    for (i = 0; found && i < known->count; i++) {
        PyObject *one = PyUnicode_FromStringAndSize(known->text[i], known->size[i]);
        if (!one) return Py_DECREF(found), NULL;
        PyList_SetItem(found, i, one);
    }
    return found;
}

/* One of the arrays that Python gives: its address, how many elements are free, and how many are written before. */
static void *array(PyObject *room, int which, int64_t *free_of_it, int64_t *before) {
    void *address = PyLong_AsVoidPtr(PyTuple_GetItem(room, 3 * which));
    *free_of_it = PyLong_AsLongLong(PyTuple_GetItem(room, 3 * which + 1));
    *before = PyLong_AsLongLong(PyTuple_GetItem(room, 3 * which + 2));
    return address;
}

static PyObject *scan(PyObject *self, PyObject *args) {
    PyObject *data, *capsule, *room;
    const char *start;
    long long length, from, base, size;
    int64_t rows = 0, used, before;
    sink out;
    (void)self;
    if (!PyArg_ParseTuple(args, "OLLLO!OL", &data, &length, &from, &base, &PyTuple_Type, &room, &capsule, &size)) return NULL;
    memset(&out, 0, sizeof out);
    out.known = (words *)PyCapsule_GetPointer(capsule, "driftprobe.words");
    start = (const char *)PyLong_AsVoidPtr(data);
    if (!out.known || PyErr_Occurred()) return NULL;
    if (from < 0 || from > length) return PyErr_Format(PyExc_ValueError, "from %lld of %lld bytes", from, length);
    if (size < 1 || PyTuple_Size(room) != 9) return PyErr_Format(PyExc_ValueError, "a sketch of %lld sums, or no room", size);
    out.sketch_size = size;
    out.rows = (row *)array(room, 0, &out.room_rows, &before);
    out.sums = (double *)array(room, 1, &out.room_sums, &out.sums_before);
    out.hashes = (uint64_t *)array(room, 2, &out.room_hashes, &out.hashes_before);
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    used = scan_lines(start + from, (int64_t)(length - from), base + from, &out, &rows);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("LLLL", (long long)used, (long long)rows, (long long)out.used_sums, (long long)out.used_hashes);
}

static PyMethodDef methods[] = {
    {"words", new_words, METH_NOARGS, "words(): an empty table of names"},
    {"list_words", list_words, METH_O, "list_words(table): the names, in order of their numbers"},
    {"scan", scan, METH_VARARGS,
     "scan(address, length, start, base, room, table, size): bytes read, and how many rows, sums and hashes were written. `room` has "
     "address, free elements and elements before of each of the three."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_scan", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__scan(void) { return PyModule_Create(&module); }
