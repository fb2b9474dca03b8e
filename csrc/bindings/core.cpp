// nano_vllm._core: the block allocator and the batch preparation as a pybind11 module.
// nano_vllm/_core.pyi documents what Python sees. The GIL is held throughout: it serialises the
// allocator's users.
#include <algorithm>

#include "bindings/core_arguments.h"
#include "cache/prepare_batch.h"
#include "cache/shared_prefix.h"

namespace nano_vllm {
namespace {

// The tokens of one full block, from a sequence or a numpy array of integers.
std::vector<int32_t> to_tokens(const py::object& token_ids, int32_t block_size) {
  const auto check_count = [&](int64_t count) {
    check(count == block_size, "token_ids must hold block_size ", block_size, " tokens, got ",
          count);
  };
  std::vector<int32_t> tokens(static_cast<size_t>(block_size));
  if (py::isinstance<py::array>(token_ids)) {
    const auto array = py::reinterpret_borrow<py::array>(token_ids);
    const char kind = array.dtype().kind();
    check(array.ndim() == 1 && (kind == 'i' || kind == 'u'),
          "token_ids must be a one-dimensional array of integers, got ",
          std::string(py::str(array.dtype())), " of ", array.ndim(), " dimensions");
    check_count(array.size());
    const py::array_t<int64_t, py::array::c_style | py::array::forcecast> wide(array);
    for (int64_t i = 0; i < block_size; ++i) {
      const int64_t token = wide.data()[i];
      check(token >= 0 && token <= kMaxInt32, "token id must be in [0, 2^31), got ", token);
      tokens[static_cast<size_t>(i)] = static_cast<int32_t>(token);
    }
    return tokens;
  }
  const py::list list(token_ids);
  check_count(static_cast<int64_t>(list.size()));
  for (int64_t i = 0; i < block_size; ++i) {
    tokens[static_cast<size_t>(i)] = item_at("token id", list.ptr(), i);
  }
  return tokens;
}

// The full blocks of the tokens from block `first` on, as far as there are any, and their hashes.
py::tuple lookup_blocks(BlockAllocator& self, const py::list& token_ids, int64_t first,
                        const py::bytes& parent, BlockOwner owner) {
  check(first >= 0, "first must be at least 0, got ", first);
  const int64_t size = self.block_size();
  const auto num_blocks = static_cast<int64_t>(token_ids.size()) / size;
  std::vector<int32_t> blocks, tokens(static_cast<size_t>(size));
  blocks.reserve(static_cast<size_t>(std::max<int64_t>(num_blocks - first, 0)));
  py::list hashes;
  BlockHash hash = to_hash(parent);
  try {
    for (int64_t index = first; index < num_blocks; ++index) {
      for (int64_t i = 0; i < size; ++i) {
        tokens[static_cast<size_t>(i)] = item_at("token id", token_ids.ptr(), index * size + i);
      }
      const int32_t block = self.lookup(hash, tokens.data(), owner);
      if (block == BlockAllocator::kNoBlock) break;
      blocks.push_back(block);
      hash = self.hash(hash, tokens.data());
      hashes.append(to_bytes(hash));
    }
    return py::make_tuple(to_list(blocks), hashes);
  } catch (...) {
    self.free_many(blocks, owner);
    throw;
  }
}

void bind_block_allocator(py::module_& module) {
  py::register_exception<OutOfBlocks>(module, "OutOfBlocks", PyExc_RuntimeError);

  py::enum_<BlockState>(module, "BlockState")
      .value("FREE", BlockState::kFree)
      .value("ACTIVE", BlockState::kActive)
      .value("CACHED", BlockState::kCached);

  py::enum_<BlockOwner>(module, "BlockOwner")
      .value("SEQUENCE", BlockOwner::kSequence)
      .value("PIN", BlockOwner::kPin)
      .value("TRANSFER", BlockOwner::kTransfer);

  using Allocator = BlockAllocator;
  constexpr BlockOwner kSequence = BlockOwner::kSequence;
  py::class_<Allocator>(module, "BlockAllocator")
      .def(py::init<int64_t, int64_t, uint64_t>(), py::arg("num_blocks"), py::arg("block_size"),
           py::arg("hash_key") = 0)
      .def_property_readonly("num_blocks", &Allocator::num_blocks)
      .def_property_readonly("block_size", &Allocator::block_size)
      .def_property_readonly("num_free", &Allocator::num_free)
      .def_property_readonly("num_cached", &Allocator::num_cached)
      .def_property_readonly("num_active", &Allocator::num_active)
      .def("num_references", &Allocator::num_references, py::arg("owner"))
      .def("allocate", &Allocator::allocate, py::arg("owner") = kSequence)
      .def(
          "allocate_many",
          [](Allocator& self, int64_t count, BlockOwner owner) {
            return to_list(self.allocate_many(count, owner));
          },
          py::arg("count"), py::arg("owner") = kSequence)
      .def("share", &Allocator::share, py::arg("block"), py::arg("owner") = kSequence)
      .def("free", &Allocator::free, py::arg("block"), py::arg("owner") = kSequence)
      .def(
          "free_many",
          [](Allocator& self, const py::list& blocks, BlockOwner owner) {
            self.free_many(to_blocks(blocks), owner);
          },
          py::arg("blocks"), py::arg("owner") = kSequence)
      .def("ref_count", &Allocator::ref_count, py::arg("block"))
      .def("state", &Allocator::state, py::arg("block"))
      .def("make_writable", &Allocator::make_writable, py::arg("block"))
      .def(
          "hash_block",
          [](const Allocator& self, const py::bytes& parent, const py::object& token_ids) {
            const std::vector<int32_t> tokens = to_tokens(token_ids, self.block_size());
            return to_bytes(self.hash(to_hash(parent), tokens.data()));
          },
          py::arg("parent"), py::arg("token_ids"))
      .def(
          "commit",
          [](Allocator& self, int64_t block, const py::bytes& parent, const py::object& token_ids) {
            const std::vector<int32_t> tokens = to_tokens(token_ids, self.block_size());
            return to_bytes(self.commit(block, to_hash(parent), tokens.data()));
          },
          py::arg("block"), py::arg("parent"), py::arg("token_ids"))
      .def("commit_blocks", &commit_blocks, py::arg("block_table"), py::arg("block_hashes"),
           py::arg("token_ids"), py::arg("num_computed"), py::arg("root") = py::bytes())
      .def(
          "lookup",
          [](Allocator& self, const py::bytes& parent, const py::object& token_ids,
             BlockOwner owner) {
            const std::vector<int32_t> tokens = to_tokens(token_ids, self.block_size());
            return self.lookup(to_hash(parent), tokens.data(), owner);
          },
          py::arg("parent"), py::arg("token_ids"), py::arg("owner") = kSequence)
      .def("lookup_blocks", &lookup_blocks, py::arg("token_ids"), py::arg("first"),
           py::arg("parent"), py::arg("owner") = kSequence)
      .def("forget", &Allocator::forget, py::arg("block"))
      .def("set_next_tier", &Allocator::set_next_tier, py::arg("tier").none(true),
           py::keep_alive<1, 2>())
      .def("take_evictions",
           [](Allocator& self) {
             py::list list;
             for (const Eviction& eviction : self.take_evictions()) {
               list.append(py::make_tuple(eviction.block, eviction.tier_block));
             }
             return list;
           })
      .def("check_integrity", &Allocator::check_integrity);
}

// One entry per sequence.
std::vector<int64_t> to_counts(const char* name, const py::list& list, size_t num_seqs) {
  check(list.size() == num_seqs, name, " must have one entry for each of the ", num_seqs,
        " sequences, got ", list.size());
  std::vector<int64_t> counts(num_seqs);
  for (size_t s = 0; s < num_seqs; ++s) {
    counts[s] = item_at(name, list.ptr(), static_cast<int64_t>(s));
  }
  return counts;
}

py::list list_at(const char* name, const py::list& lists, size_t s) {
  const py::object item = lists[s];
  if (!py::isinstance<py::list>(item)) {
    throw py::type_error(std::string(name) + " must hold lists, got " +
                         Py_TYPE(item.ptr())->tp_name);
  }
  return item;
}

py::tuple prepare(const py::list& token_ids, const py::list& block_tables,
                  const py::list& num_computed, const py::list& num_tokens, int64_t block_size,
                  py::array out_input_ids, py::array out_positions, py::array out_slot_mapping,
                  py::array out_query_start_loc, py::array out_seq_lens,
                  py::array out_block_tables) {
  check(block_size > 0 && block_size <= kMaxInt32, "block_size must be in [1, 2^31), got ",
        block_size);
  const size_t num_seqs = token_ids.size();
  check(block_tables.size() == num_seqs, "block_tables must have one entry for each of the ",
        num_seqs, " sequences, got ", block_tables.size());
  const std::vector<int64_t> computed = to_counts("num_computed", num_computed, num_seqs);
  const std::vector<int64_t> scheduled = to_counts("num_tokens", num_tokens, num_seqs);
  int64_t total = 0;
  for (const int64_t count : scheduled) total += count;
  check(total <= kMaxInt32, "a batch must have fewer than 2^31 tokens, got ", total);

  const auto rows = static_cast<int64_t>(num_seqs);
  int64_t* input_ids = output<int64_t>("out_input_ids", out_input_ids, {total});
  int32_t* tables = output<int32_t>("out_block_tables", out_block_tables, {rows, -1});
  const int64_t width = out_block_tables.shape(1);
  PrepareBatchParams params{};
  params.num_computed = computed.data();
  params.num_tokens = scheduled.data();
  params.block_tables = tables;
  params.block_tables_stride = out_block_tables.strides(0) / static_cast<int64_t>(sizeof(int32_t));
  params.num_seqs = rows;
  params.block_size = block_size;
  params.positions = output<int64_t>("out_positions", out_positions, {total});
  params.slot_mapping = output<int64_t>("out_slot_mapping", out_slot_mapping, {total});
  params.query_start_loc = output<int32_t>("out_query_start_loc", out_query_start_loc, {rows + 1});
  params.seq_lens = output<int32_t>("out_seq_lens", out_seq_lens, {rows});

  for (size_t s = 0; s < num_seqs; ++s) {
    const py::list tokens = list_at("token_ids", token_ids, s);
    const py::list table = list_at("block_tables", block_tables, s);
    const int64_t begin = computed[s], end = begin + scheduled[s];
    const auto num_seq_tokens = static_cast<int64_t>(tokens.size());
    const auto num_blocks = static_cast<int64_t>(table.size());
    check(end <= num_seq_tokens, "sequence ", s, " of the batch has ", num_seq_tokens,
          " tokens, too few to compute tokens ", begin, " to ", end);
    check(end <= kMaxInt32, "sequence ", s, " of the batch must end below 2^31 tokens, got ", end);
    check(end <= num_blocks * block_size, "sequence ", s, " of the batch has ", num_blocks,
          " blocks of ", block_size, " tokens, too few for ", end, " tokens");
    check(num_blocks <= width, "sequence ", s, " of the batch has ", num_blocks,
          " blocks, more than the ", width, " columns of out_block_tables");
    for (int64_t i = begin; i < end; ++i) {
      *input_ids++ = item_at("token id", tokens.ptr(), i);
    }
    int32_t* row = tables + static_cast<int64_t>(s) * params.block_tables_stride;
    if (s > 0 && table.is(block_tables[s - 1])) {  // tokens of one prompt, each a row
      std::copy_n(row - params.block_tables_stride, width, row);
      continue;
    }
    for (int64_t i = 0; i < num_blocks; ++i) row[i] = item_at("block", table.ptr(), i);
    for (int64_t i = num_blocks; i < width; ++i) row[i] = 0;
  }
  const BatchBounds bounds = prepare_batch(params);
  return py::make_tuple(bounds.max_query_len, bounds.max_seq_len);
}

int64_t shared_prefixes(py::array query_start_loc, py::array seq_lens, py::array block_tables,
                        int64_t block_size, int64_t min_saved_tokens, py::array out) {
  check(block_size > 0, "block_size must be at least 1, got ", block_size);
  SharedPrefixParams params{};
  params.num_seqs = seq_lens.size();
  params.seq_lens = output<int32_t>("seq_lens", seq_lens, {params.num_seqs});
  params.query_start_loc =
      output<int32_t>("query_start_loc", query_start_loc, {params.num_seqs + 1});
  const int32_t* table = output<int32_t>("block_tables", block_tables, {params.num_seqs, -1});
  std::vector<const int32_t*> tables(static_cast<size_t>(params.num_seqs));
  for (const int32_t*& row : tables) {
    row = table;
    table += block_tables.strides(0) / static_cast<int64_t>(sizeof(int32_t));
  }
  params.block_tables = tables.data();
  params.block_size = block_size;
  params.min_saved_tokens = min_saved_tokens;
  params.leaders = output<int32_t>("out", out, {2, params.num_seqs});
  params.lens = params.leaders + out.strides(0) / static_cast<int64_t>(sizeof(int32_t));
  for (int64_t s = 0; s < params.num_seqs; ++s) {
    check(params.seq_lens[s] <= block_tables.shape(1) * block_size, "sequence ", s,
          " has more tokens than its block table holds: ", params.seq_lens[s]);
  }
  return find_shared_prefixes(params);
}

// Where the first thing stands that is no token id, -1 if there is none.
int64_t first_not_a_token(const py::object& token_ids, int64_t vocab_size) {
  const auto items = py::reinterpret_steal<py::object>(
      PySequence_Fast(token_ids.ptr(), "token_ids must be a sequence"));
  if (!items) throw py::error_already_set();
  PyObject* const* const begin = PySequence_Fast_ITEMS(items.ptr());
  const int64_t count = PySequence_Fast_GET_SIZE(items.ptr());
  for (int64_t i = 0; i < count; ++i) {
    if (!PyLong_CheckExact(begin[i])) return i;  // as True is an int
    int overflow = 0;  // no code of Python's runs for a plain int, and nothing is raised
    const int64_t token = PyLong_AsLongLongAndOverflow(begin[i], &overflow);
    if (overflow != 0 || token < 0 || token >= vocab_size) return i;
  }
  return -1;
}

}  // namespace
}  // namespace nano_vllm

PYBIND11_MODULE(_core, module) {
  namespace py = pybind11;
  nano_vllm::bind_block_allocator(module);
  nano_vllm::bind_decode_rows(module);
  module.def("prepare_batch", &nano_vllm::prepare, py::arg("token_ids"), py::arg("block_tables"),
             py::arg("num_computed"), py::arg("num_tokens"), py::arg("block_size"),
             py::arg("out_input_ids"), py::arg("out_positions"), py::arg("out_slot_mapping"),
             py::arg("out_query_start_loc"), py::arg("out_seq_lens"), py::arg("out_block_tables"));
  module.def("find_shared_prefixes", &nano_vllm::shared_prefixes, py::arg("query_start_loc"),
             py::arg("seq_lens"), py::arg("block_tables"), py::arg("block_size"),
             py::arg("min_saved_tokens"), py::arg("out"));
  module.def("first_not_a_token", &nano_vllm::first_not_a_token, py::arg("token_ids"),
             py::arg("vocab_size"));
}
