#define VIVACE_ISA(op) op##_avx2
#include "sparse.h"
