/* The header as a shared library, for the tests to call. */
#define DRIFTPROBE_IMPLEMENTATION
#include "driftprobe.h"

const size_t dp_test_sizes[] = {sizeof(dp_tensor), sizeof(dp_key), sizeof(dp_header), sizeof(dp_fingerprint)};
