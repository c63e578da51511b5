// What a node's definition gives as the placeholder of a line of text: the editor itself shows those of larger texts alone.
import { app } from "../../scripts/app.js"

app.registerExtension({
  name: "SpargeAttn.placeholders",
  nodeCreated(node) {
    const definition = node.constructor.nodeData
    if (!node.comfyClass?.includes("SpargeAttn")) return // the category is in the editor's language
    for (const widget of node.widgets ?? []) {
      const { required, optional } = definition.input
      const placeholder = (required?.[widget.name] ?? optional?.[widget.name])?.[1]?.placeholder
      if (placeholder) widget.options.placeholder = placeholder
    }
  }
})
