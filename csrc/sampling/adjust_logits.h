// Logits as a request wants them before a token is drawn: with penalties for what has been said, a
// bias, and -inf for tokens that must not come next.
//
// In this order: the repetition penalty divides a positive logit and multiplies a negative one of
// each token that the sequence holds; of each token of the output the frequency penalty is
// subtracted as often as it occurs, then the presence penalty once; the bias is added; all tokens
// but the allowed ones, the ends of an output that is still shorter than min_tokens, and the last
// token of a bad word whose others the output ends with, become -inf.
//
// A row whose largest logit is not finite becomes NaN.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/types.h"

namespace nano_vllm {

// Lists of tokens, one after the other: list i is tokens[starts[i]] to tokens[starts[i + 1] - 1].
struct TokenLists {
  const int32_t* starts;  // [number of lists + 1]
  const int32_t* tokens;
};

struct AdjustLogitsParams {
  DType dtype;
  float* out;           // [num_rows, vocab_size]
  const void* logits;   // [num_logits_rows, vocab_size]
  const int32_t* rows;  // [num_rows]: the row of logits, new_token_ids and seq_lens

  // The tokens of each sequence. new_token_ids, the last token of each, is written behind those
  // that are there before it is read.
  int32_t* token_ids;            // [num_slots, ...]
  const int32_t* slots;          // [num_rows]: the row of token_ids, -1 for none
  const int64_t* new_token_ids;  // [num_logits_rows]
  const int32_t* seq_lens;       // [num_logits_rows]
  const int32_t* prompt_lens;    // [num_rows]

  // [num_rows] each; without a slot they count for nothing.
  const float* repetition_penalties;
  const float* frequency_penalties;
  const float* presence_penalties;

  TokenLists bias;                 // a list a row
  const float* bias_values;        // beside bias.tokens
  TokenLists allowed;              // a list a row; an empty one allows all
  TokenLists ends;                 // a list a row
  const int32_t* min_tokens;       // [num_rows]
  const int32_t* bad_word_starts;  // [num_rows + 1]: which of bad_words are the row's
  TokenLists bad_words;            // a list a word; needs a slot

  int64_t logits_stride_row, out_stride_row, token_ids_stride;  // in elements

  int32_t num_rows, vocab_size;
};

namespace cpu {
void adjust_logits(const AdjustLogitsParams& params);
}
namespace cuda {
void adjust_logits(const AdjustLogitsParams& params, cudaStream_t stream);
}

}  // namespace nano_vllm
