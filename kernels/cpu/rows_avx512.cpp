#define VIVACE_ISA(op) op##_avx512
#include "rows.h"
