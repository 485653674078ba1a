// The call of rotary_embedding, and the quick look at its tensors.
#pragma once

#include "arguments.h"
#include "plain.h"

namespace ppo {
namespace {

RotatedHeads rotated_heads(const Tensor& x, const Tensor& out) {
  return {heads(x), x.size(1), out.data()};
}

Tokens angles(const Tensor& x, int64_t rows) {  // [rows, T, R], or [1, T, R]
  return {x.data(), x.size(0) == rows ? x.stride(0) : 0, x.stride(1)};
}

void rotary_embedding(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                      bool transposed, const Tensor& out_query, const Tensor& out_key,
                      int threads) {
  RotaryEmbedding args{};
  args.dtype = common_dtype({&query, &key, &out_query, &out_key});
  args.angles_dtype = common_dtype({&cos, &sin});
  args.rows = query.size(0);
  args.tokens = query.size(2);
  args.width = query.size(3);
  args.rotated = cos.size(2);
  args.transposed = transposed;
  args.cos = angles(cos, args.rows);
  args.sin = angles(sin, args.rows);
  args.query = rotated_heads(query, out_query);
  args.key = rotated_heads(key, out_key);
  const int64_t numbers = (args.query.count + args.key.count) * args.width;
  args.threads = threads_for(args.rows * args.tokens * numbers, threads);
  active_isa().kernels->rotary_embedding(args);
}

// Whether these tensors need no closer look, as tokens_fit says of a loss's.
bool rotary_fits(py::handle query, py::handle key, py::handle cos, py::handle sin) {
  Tensor q, k, c, s;
  if (!is_plain(query, q) || !is_plain(key, k) || !is_plain(cos, c) || !is_plain(sin, s)) {
    return false;
  }
  for (const Tensor* x : {&q, &k, &c, &s}) {
    if (!x->is_floating() || !x->same_device(q)) return false;
  }
  return q.dims() == 4 && k.dims() == 4 && k.dtype() == q.dtype() && k.size(0) == q.size(0) &&
         k.size(2) == q.size(2) && k.size(3) == q.size(3) && c.dims() == 3 && s.same_shape(c) &&
         (c.size(0) == q.size(0) || c.size(0) == 1) && c.size(1) == q.size(2) &&
         c.size(2) <= q.size(3) && c.size(2) % 2 == 0;
}

}  // namespace
}  // namespace ppo
