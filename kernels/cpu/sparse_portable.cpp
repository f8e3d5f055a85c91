#define VIVACE_ISA(op) op##_portable
#include "sparse.h"
