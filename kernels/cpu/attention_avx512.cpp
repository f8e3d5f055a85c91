#define VIVACE_ISA(op) op##_avx512
#include "attention.h"
#include "kept_mass.h"
