#define VIVACE_ISA(op) op##_portable
#include "rows.h"
