// How Python's arguments become those of C++, for the parts of nano_vllm._core.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "cache/block_allocator.h"
#include "common/error.h"

namespace nano_vllm {

namespace py = pybind11;

inline constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// The item of a list of token ids, blocks or counts. The list's size is looked at each time, as an
// object's __index__ may run any code.
inline int32_t item_at(const char* what, PyObject* list, int64_t i) {
  if (i >= PyList_GET_SIZE(list)) throw py::index_error("a list has shrunk while it was read");
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(PyList_GET_ITEM(list, i), &overflow);
  if (value >= 0 && value <= kMaxInt32) return static_cast<int32_t>(value);
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  fail(what, " must be in [0, 2^31), got ",
       overflow != 0 ? "an integer of more than 64 bits" : std::to_string(value));
}

inline std::vector<int32_t> to_blocks(const py::list& list) {
  std::vector<int32_t> blocks(list.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i] = item_at("block", list.ptr(), static_cast<int64_t>(i));
  }
  return blocks;
}

inline py::list to_list(const std::vector<int32_t>& blocks) {
  py::list list(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), py::int_(blocks[i]).release().ptr());
  }
  return list;
}

// In Python a hash is 16 bytes, and b"" stands before a sequence's first block.
inline BlockHash to_hash(const py::bytes& bytes) {
  const std::string_view view = bytes;
  check(view.empty() || view.size() == sizeof(BlockHash), "parent must be b\"\" or ",
        sizeof(BlockHash), " bytes long, got ", view.size(), " bytes");
  BlockHash hash;
  if (!view.empty()) std::memcpy(&hash, view.data(), sizeof(hash));
  return hash;
}

inline py::bytes to_bytes(const BlockHash& hash) {
  return py::bytes(reinterpret_cast<const char*>(&hash), sizeof(hash));
}

// The data of a writable array of this type, row by row with a contiguous last dimension. Shape
// entries of -1 are free.
template <class T>
T* output(const char* name, py::array& array, std::initializer_list<int64_t> shape) {
  const auto describe = [](const auto& sizes, size_t dims) {
    std::string text = "[";
    for (size_t i = 0; i < dims; ++i) {
      const int64_t size = sizes[i];
      text += (i > 0 ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
    }
    return text + "]";
  };
  // Messages are made where they are needed alone: a step has a dozen arrays.
  if (!py::isinstance<py::array_t<T>>(array)) {
    fail(name, " must be ", std::string(py::str(py::dtype::of<T>())), ", got ",
         std::string(py::str(array.dtype())));
  }
  const auto dims = static_cast<size_t>(array.ndim());
  bool matches = dims == shape.size();
  for (size_t i = 0; matches && i < dims; ++i) {
    const int64_t wanted = shape.begin()[i];
    matches = wanted < 0 || wanted == array.shape(static_cast<py::ssize_t>(i));
  }
  if (!matches) {
    fail(name, " must have shape ", describe(shape.begin(), shape.size()), ", got ",
         describe(array.shape(), dims));
  }
  check(array.size() == 0 || (array.strides(array.ndim() - 1) == sizeof(T) &&
                              array.strides(0) % static_cast<int64_t>(sizeof(T)) == 0),
        name, " must be contiguous in its last dimension");
  check(array.writeable(), name, " must be writable");
  return static_cast<T*>(array.mutable_data());
}

// Says of the full blocks up to num_computed tokens what they contain, and appends their hashes;
// len(block_hashes) blocks are committed already. The root stands before the first block.
inline void commit_blocks(BlockAllocator& allocator, const py::list& block_table,
                          py::list block_hashes, const py::list& token_ids, int64_t num_computed,
                          const py::bytes& root) {
  const int64_t size = allocator.block_size();
  std::vector<int32_t> tokens(static_cast<size_t>(size));
  for (auto index = static_cast<int64_t>(block_hashes.size()); index < num_computed / size;
       ++index) {
    for (int64_t i = 0; i < size; ++i) {
      tokens[static_cast<size_t>(i)] = item_at("token id", token_ids.ptr(), index * size + i);
    }
    const BlockHash parent =
        to_hash(index > 0 ? py::bytes(block_hashes[static_cast<size_t>(index - 1)]) : root);
    const int32_t block = item_at("block", block_table.ptr(), index);
    block_hashes.append(to_bytes(allocator.commit(block, parent, tokens.data())));
  }
}

void bind_decode_rows(py::module_& module);

}  // namespace nano_vllm
