#define kLanes 8
#define VIVACE_ISA(op) op##_avx2
#include "rows.h"
