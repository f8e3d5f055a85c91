#define VIVACE_ISA(op) op##_avx2
#include "rows.h"
