// The widgets inside a dynamic combo bring their tooltip from the node's definition, which is English, and it goes before
// the translation. Without it, the translation is shown.
import { app } from "../../scripts/app.js"

const TRANSLATED = ["zh", "zh-TW"]

app.registerExtension({
  name: "SpargeAttn.tooltips",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "ApplySpargeAttn" || !TRANSLATED.includes(app.extensionManager.setting.get("Comfy.Locale")))
      return
    for (const option of nodeData.input.optional.selection[1].options)
      for (const inputs of Object.values(option.inputs))
        for (const input of Object.values(inputs)) delete input[1]?.tooltip
  }
})
