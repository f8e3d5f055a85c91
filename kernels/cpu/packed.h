// Where the numbers of a quantized matrix [N, K] lie: tiles of 32 outputs, so that a thread reads one stream.
//
// int8: all tiles, each [K4][32][4] bytes (K4 = K / 4, up; the rest is 0), then the sums over k of all outputs, int32, then
//   their scales, fp32; both padded to whole tiles.
// int4: all tiles, each group after group: the group's scales, fp16 [32], then [K8][2][16][4] bytes (K8 = the group's length / 8,
//   up): of 8 inputs and 16 outputs, the low nibble input j, the high one input j + 4, both plus 8. Then, for all outputs, the
//   sum over k of what the numbers stand for, fp32.
#pragma once
#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kTile = 32;

inline int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

struct Int8Matrix {
  const uint8_t* data;
  int64_t N, K;

  int64_t tiles() const { return up(N, kTile); }
  int64_t steps() const { return up(K, 4); }
  int64_t tile_bytes() const { return steps() * 4 * kTile; }
  const int8_t* tile(int64_t i) const { return reinterpret_cast<const int8_t*>(data) + i * tile_bytes(); }
  const int32_t* sums() const { return reinterpret_cast<const int32_t*>(data + tiles() * tile_bytes()); }
  const float* scales() const { return reinterpret_cast<const float*>(sums() + tiles() * kTile); }
  int64_t bytes() const { return tiles() * (tile_bytes() + 8 * kTile); }
};

struct Int4Matrix {
  const uint8_t* data;
  int64_t N, K, group;

  int64_t tiles() const { return up(N, kTile); }
  int64_t groups() const { return up(K, group); }
  int64_t inputs(int64_t g) const { return std::min(group, K - g * group); }
  int64_t group_bytes(int64_t g) const { return 2 * kTile + up(inputs(g), 8) * 4 * kTile; }
  int64_t tile_bytes() const { return (groups() - 1) * group_bytes(0) + group_bytes(groups() - 1); }
  const uint8_t* tile(int64_t i) const { return data + i * tile_bytes(); }
  const float* sums() const { return reinterpret_cast<const float*>(data + tiles() * tile_bytes()); }
  int64_t bytes() const { return tiles() * (tile_bytes() + 4 * kTile); }
};

}  // namespace
