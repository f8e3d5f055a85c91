#define VIVACE_ISA(op) op##_portable
#include "attention.h"
#include "kept_mass.h"
