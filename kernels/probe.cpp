// Whether a compiler, OpenMP and vector extensions work here; see native.py.
#include "native.h"

extern "C" int probe() { return omp_get_max_threads() + int(splat(0.0f)[0]); }
