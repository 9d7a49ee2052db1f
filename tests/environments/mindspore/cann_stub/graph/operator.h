// Stands in for CANN in a syntax check: the names that MindSpore's headers use, nothing else.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include "graph/types.h"

namespace ge {
class Allocator;
using AllocatorPtr = std::shared_ptr<Allocator>;
class Graph;
class Shape;
class Tensor {};
class TensorDesc {};

class Operator {
 public:
  Operator() = default;
  explicit Operator(const std::string &) {}
  Operator(const std::string &, const std::string &) {}
  virtual ~Operator() = default;
  std::string GetName() const;

 protected:
  void InputRegister(const std::string &) {}
  void OptionalInputRegister(const std::string &) {}
  void OutputRegister(const std::string &) {}
  void RequiredAttrRegister(const std::string &) {}
  void InferFuncRegister(const std::function<graphStatus(Operator &)> &) {}
};

class OperatorFactory {
 public:
  static bool IsExistOp(const std::string &);
  static Operator CreateOperator(const std::string &, const std::string &);
};
}  // namespace ge
