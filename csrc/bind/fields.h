// SPDX-License-Identifier: Apache-2.0
// A call of vsa._C: a struct of launch/ whose fields Python gives by keyword, each exactly once.
//
// One table per call says which fields those are. The constructor, its errors, FIELDS and with it
// the stub vsa/_C.pyi come from that table.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind/arguments.h"
#include "bind/program.h"

namespace vsa::bind {

// What a field demands of its value: must(), for the sentence, and holds(value).
struct Anything {
  static std::string must() { return ""; }
  static bool holds(const auto&) { return true; }
};
struct Positive {
  static std::string must() { return "be positive"; }
  static bool holds(int64_t x) { return x > 0; }
};
struct AllPositive {
  static std::string must() { return "be positive numbers"; }
  static bool holds(const std::vector<int>& xs) {
    for (int x : xs)
      if (x <= 0) return false;
    return true;
  }
};
struct NotNegative {
  static std::string must() { return "not be negative"; }
  static bool holds(int64_t x) { return x >= 0; }
};
struct Share {
  static std::string must() { return "be in [0, 1]"; }
  static bool holds(double x) { return x >= 0 && x <= 1; }
};
struct NotNull {
  static std::string must() { return "not be a null address"; }
  static bool holds(const void* x) { return x != nullptr; }
  static bool holds(const launch::TokenView& x) { return holds(x.data); }
  static bool holds(const launch::MatrixView& x) { return holds(x.data); }
  static bool holds(const launch::SequenceView& x) { return holds(x.video); }
};

// One of the values that kernels are compiled for.
template <class Values>
struct OneOf;
template <auto... values>
struct OneOf<launch::Values<values...>> {
  static py::tuple all() { return py::make_tuple(written(values)...); }
  static std::string must() { return "be one of " + py::str(all()).cast<std::string>(); }
  static bool holds(auto x) { return ((x == values) || ...); }

 private:
  static int written(int x) { return x; }
  static const char* written(launch::Dtype x) { return name_of(x); }
};

// A field of a call, of whatever class either is: only `at` is compiled for each field, the rest
// for each type of one. pybind11's templates for each of two hundred fields would take a minute.
struct Field {
  const char* name;
  std::string (*type)();
  void* (*at)(void* call);
  void (*read)(void* field, py::handle, const std::string& full_name);
  Link link;
};

[[noreturn]] void refuse_type(py::handle x, const std::string& name, std::string allowed);
[[noreturn]] void refuse_value(py::handle x, const std::string& name, const std::string& must);

// Reads a value of type T into a field, or throws a sentence that begins with the field's name.
template <class T, class Check>
void read_field(void* field, py::handle x, const std::string& name) {
  T& to = *static_cast<T*>(field);
  try {
    to = Python<T>::read(x, name);
  } catch (const py::cast_error&) {
    refuse_type(x, name, Python<T>::type());
  } catch (const py::reference_cast_error&) {  // None for an object
    refuse_type(x, name, Python<T>::type());
  }
  if (!Check::holds(to)) refuse_value(x, name, Check::must());
}

template <class T, class Check>
constexpr Field field_of(const char* name, void* (*at)(void* call)) {
  return {name, Python<T>::type, at, read_field<T, Check>, link_of<T>()};
}

template <auto member>
struct Member;
template <class Owner, class T, T Owner::* member>
struct Member<member> {
  using Type = T;
};

template <class Call, auto member>
void* at_member(void* call) {
  return &(static_cast<Call*>(call)->*member);
}
template <class Call, auto member, class Check = Anything>
constexpr Field field(const char* name) {
  return field_of<typename Member<member>::Type, Check>(name, at_member<Call, member>);
}
#define VSA_FIELD(Call, member, ...) \
  ::vsa::bind::field<Call, &Call::member __VA_OPT__(, ) __VA_ARGS__>(#member)

// What a call inherits, given as one object of the class that is bound to it.
template <class Call, class Base>
void* at_base(void* call) {
  return static_cast<Base*>(static_cast<Call*>(call));
}
template <class Call, class Base>
constexpr Field inherited(const char* name) {
  return field_of<Base, Anything>(name, at_base<Call, Base>);
}

// The fields in the order of the table, with the strings that keywords are looked up by.
class Table {
 public:
  Table(const char* owner, std::initializer_list<Field> fields);
  void fill(void* call, const py::kwargs& given) const;
  py::dict types() const;
  std::vector<LinkedField> links() const;  // of the fields that hold addresses

 private:
  struct Row {
    PyObject* key;
    std::string full_name;
    Field field;
  };

  [[noreturn]] void refuse_unknown(const py::kwargs& given) const;

  std::string owner_;
  std::vector<Row> rows_;
};

// The class of a call, Python's FIELDS: names and types of its keywords.
template <class Call>
py::class_<Call> bind_struct(py::module_& m,
                             const char* name,
                             const char* doc,
                             std::initializer_list<Field> fields) {
  static const Table table(name, fields);  // once for each class
  links<Call>() = table.links();
  py::class_<Call> bound(m, name, doc);
  bound.def(py::init([](const py::kwargs& given) {
    Call call{};
    table.fill(&call, given);
    return call;
  }));
  bound.attr("FIELDS") = table.types();
  return bound;
}

inline void raise_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("vsa: " + error);
}

// How one method of a class runs a call of it: as it is, or with the addresses of a run.
template <auto on_gpu, class Call>
std::string launched(const void* call, const Slots* slots, int device, void* stream) {
  const Call& known = *static_cast<const Call*>(call);
  return on_gpu(slots ? linked(known, *slots) : known, device, stream);
}
template <auto on_cpu, class Call>
std::string emulated(const void* call, const Slots* slots, int blocks, unsigned seed) {
  const Call& known = *static_cast<const Call*>(call);
  if constexpr (std::is_invocable_v<decltype(on_cpu), const Call&>)
    return on_cpu(slots ? linked(known, *slots) : known);
  else
    return on_cpu(slots ? linked(known, *slots) : known, blocks, seed);
}

struct MethodNames {
  const char *launch = "launch", *emulate = "emulate", *step = "step";
};
void bind_methods(py::handle bound, const MethodNames& names, const Runs& runs);

// Three methods: the kernels on a GPU, the same kernels on the CPU, and either in a Program.
// Kernels without matrix products need no emulator, and ignore blocks and seed.
template <auto on_gpu, auto on_cpu, class Call>
void bind_run(py::class_<Call>& bound, const MethodNames& names = {}) {
  bind_methods(bound, names,
               {[](py::handle self) -> const void* { return &self.cast<const Call&>(); },
                [](const void* call) -> std::shared_ptr<const void> {
                  return std::make_shared<Call>(*static_cast<const Call*>(call));
                },
                launched<on_gpu, Call>, emulated<on_cpu, Call>});
}

void bind_fine(py::module_& m);
void bind_coarse_select(py::module_& m);
void bind_float_product(py::module_& m);
void bind_tail(py::module_& m);
void bind_sub_blocks(py::module_& m);
void bind_low_precision(py::module_& m);
void bind_masked_coarse(py::module_& m);
void bind_chunks(py::module_& m);
void bind_padded(py::module_& m);

}  // namespace vsa::bind
