// Sockets and links of tuned parameters have a colour of their own. One that the user's colour palette gives goes first.
import { app } from "../../scripts/app.js"

const TYPE = "SPARGE_PARAMS"
const COLOR = "#2fb596"

// The editor empties the entry whenever it loads a palette.
function colorByDefault(colors) {
  let given = colors[TYPE]
  Object.defineProperty(colors, TYPE, { enumerable: true, get: () => given || COLOR, set: color => (given = color) })
}

app.registerExtension({
  name: "SpargeAttn.socketColor",
  setup() {
    const canvas = app.canvas
    for (const colors of [canvas?.default_connection_color_byType, canvas?.constructor.link_type_colors])
      if (colors) colorByDefault(colors)
    const style = document.createElement("style")
    style.textContent = `:root { --color-datatype-${TYPE}: ${COLOR} }`
    document.head.append(style)
  }
})
