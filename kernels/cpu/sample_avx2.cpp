#define VIVACE_ISA(op) op##_avx2
#include "logprobs.h"
#include "sample.h"
