#include "quantize_rows.h"

namespace cpu {
void quantize_avx2(Pool& pool, const QuantizeArgs& a) { Quantizer::run(pool, a); }
}  // namespace cpu
