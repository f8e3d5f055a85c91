#include "quantize_rows.h"

namespace cpu {
void quantize_avx512(Pool& pool, const QuantizeArgs& a) { Quantizer::run(pool, a); }
}  // namespace cpu
