// start_percent and end_percent push each other along, so that the editor sends no window that ends before it starts.
import { app } from "../../scripts/app.js"

const find = (node, name) => node.widgets?.find(widget => widget.name === name)

function push(node, name, other, beyond) {
  const widget = find(node, name), { callback } = widget
  widget.callback = function (value, ...rest) {
    const result = callback?.call(this, value, ...rest), pushed = find(node, other)
    if (beyond(value, pushed.value)) {
      pushed.value = value
      pushed.callback?.call(pushed, value, ...rest) // what else follows that widget
    }
    return result
  }
}

app.registerExtension({
  name: "SpargeAttn.window",
  nodeCreated(node) {
    // The node's category would be in the editor's language.
    if (!node.comfyClass?.includes("SpargeAttn") || !find(node, "start_percent")) return
    push(node, "start_percent", "end_percent", (start, end) => start > end)
    push(node, "end_percent", "start_percent", (end, start) => end < start)
  }
})
