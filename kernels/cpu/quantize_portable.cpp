#include "quantize_rows.h"

namespace cpu {
void quantize_portable(Pool& pool, const QuantizeArgs& a) { Quantizer::run(pool, a); }
}  // namespace cpu
