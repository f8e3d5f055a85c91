#define VIVACE_ISA(op) op##_portable
#include "activation.h"
