// SPDX-License-Identifier: Apache-2.0
//
// Shapes and dtypes of the operators in graphs, for MindSpore's compiler. Nothing here needs CANN,
// so it is built and asked on the CPU target too; kernels are in v4_graph_kernels.cc, and the module
// with the eager functions in v4_ops.cc.

#include "graph_operators.h"

namespace v4_ascend::graph {
template <typename Operator>
class Inferred : public mindspore::ops::OpFuncImpl {
 public:
  mindspore::ShapeArray InferShape(const mindspore::PrimitivePtr &, const Infos &call) const override {
    for (const auto parameter : Operator::Shaped()) {
      if (call[parameter]->IsDynamicRank()) {
        const Shape unknown{mindspore::abstract::Shape::kShapeRankAny};
        return mindspore::ShapeArray(Operator::TypesOf(call).size(), unknown);
      }
    }
    return Operator::ShapesOf(call);
  }
  Types InferType(const mindspore::PrimitivePtr &, const Infos &call) const override { return Operator::TypesOf(call); }
  bool GeneralInferRegistered() const override { return true; }
};
}  // namespace v4_ascend::graph

// Names that MindSpore's generated definitions refer to.
namespace mindspore::ops {
#define V4_ASCEND_INFER(name, Operator)                                 \
  static v4_ascend::graph::Inferred<v4_ascend::graph::Operator> g_##name; \
  OpFuncImpl &gCustom_##name##FuncImpl = g_##name;
V4_ASCEND_OPERATORS(V4_ASCEND_INFER)
}  // namespace mindspore::ops
