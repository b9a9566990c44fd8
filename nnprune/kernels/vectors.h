/* Vectors that any processor's compiler makes the best of. */

#pragma once

#include <string.h>

#include "native.h"

#define LANES 16
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));

static inline floats blend(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }
