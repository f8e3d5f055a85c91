#define VIVACE_ISA(op) op##_avx512
#include "sparse.h"
