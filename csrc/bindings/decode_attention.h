// The call of decode_attention, which looks at the lengths first.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"

namespace ppo {
namespace {

// Returns the index of the first length that no row of keys has (-1 where all are right), computing
// nothing then.
int64_t decode_attention(const Tensor& query, const Tensor& keys, const Tensor& values,
                         const Tensor& lengths, double scale, double softcap, int64_t window,
                         const Tensor& sinks, const Tensor& new_keys, const Tensor& new_values,
                         const Tensor& out, int threads) {
  DecodeAttention args{};
  args.query_dtype = query.dtype();
  args.dtype = common_dtype({&keys, &values});
  args.rows = query.size(0);
  args.kv_heads = keys.size(1);
  args.group = query.size(1) / std::max<int64_t>(args.kv_heads, 1);
  args.width = query.size(2);
  args.value_width = values.size(3);
  args.query = heads(query);
  args.keys = heads(keys);
  args.values = heads(values);
  if (new_keys) {
    args.new_keys = heads(new_keys);
    args.new_values = heads(new_values);
    args.new_keys_dtype = new_keys.dtype();
    args.new_values_dtype = new_values.dtype();
  }
  args.lengths = lengths.data<const int64_t>();
  args.scale = scale;
  args.softcap = softcap;
  args.window = window;
  args.sinks = sinks.data();
  args.out = out.data();
  int64_t longest = 0, all = 0;
  for (int64_t b = 0; b < args.rows; ++b) {
    const int64_t length = args.lengths[b];
    if (length < 0 || length > keys.size(2)) return b;
    longest = std::max(longest, std::min(length, window));
    all += std::min(length, window);
  }
  args.pieces = std::max<int64_t>((longest + kKeysPerPiece - 1) / kKeysPerPiece, 1);
  std::vector<double> parts;
  if (args.pieces > 1) {
    parts.resize(size_t(out.size(0) * out.size(1) * args.pieces * (args.value_width + 2)));
    args.parts = parts.data();
  }
  args.threads = threads_for(all * args.kv_heads * (args.width + args.value_width), threads);
  active_isa().kernels->decode_attention(args);
  return -1;
}

}  // namespace
}  // namespace ppo
