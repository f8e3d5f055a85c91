#define VIVACE_ISA(op) op##_portable
#include "logprobs.h"
#include "sample.h"
