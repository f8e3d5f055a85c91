#define VIVACE_ISA(op) op##_avx512
#include "logprobs.h"
#include "sample.h"
