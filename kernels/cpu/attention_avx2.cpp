#define VIVACE_ISA(op) op##_avx2
#include "attention.h"
#include "kept_mass.h"
